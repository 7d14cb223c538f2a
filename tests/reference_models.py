"""transformers' own models with random weights, and the same weights as ours.

Each case takes a preset, with all its switches, to odd and pairwise distinct
sizes, and sets beside it transformers' config, written out on its own.
"""
import dataclasses
import functools
import typing

import numpy as np
import torch
import transformers

import jaxlm
from jaxlm.config import MLAConfig, MLPConfig, ModelConfig
from reference_weights import params_of

# Models this small only wait for each other on several threads.
torch.set_num_threads(1)

BATCH, LENGTH, VOCAB = 2, 151, 101
D_MODEL, D_FF, HEADS, KV_HEADS, HEAD_DIM = 45, 23, 15, 5, 22
EXPERTS, PER_TOKEN = 11, 4
# Of latent attention: a head has 11 + 10 components, its values 13.
LATENT_SIZES = dict(num_heads=HEADS, q_rank=33, kv_rank=19, nope_head_dim=11,
                    rope_head_dim=10, v_head_dim=13)

REFERENCE_SIZES = dict(
    vocab_size=VOCAB, hidden_size=D_MODEL, num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM)


def shrink(name: str, num_layers: int, *, attention=None, moe=None, **fields):
  """The preset of that name in small, with some fields replaced."""
  config = jaxlm.preset(name)
  sizes = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
  if isinstance(config.attention, MLAConfig):
    sizes = LATENT_SIZES
  fields["attention"] = dataclasses.replace(
      config.attention, **(sizes | (attention or {})))
  if config.mlp:
    mlp = dataclasses.replace(config.mlp, d_ff=D_FF)
    fields = {"mlp": mlp} | fields
  if config.moe:
    sizes = dict(num_experts=EXPERTS, experts_per_token=PER_TOKEN,
                 expert=dataclasses.replace(config.moe.expert, d_ff=D_FF))
    fields["moe"] = dataclasses.replace(config.moe, **(sizes | (moe or {})))
  return dataclasses.replace(config, vocab_size=VOCAB, d_model=D_MODEL,
                             num_layers=num_layers, **fields)


def _gpt2():
  heads = dict(num_heads=5, num_kv_heads=5, head_dim=9)
  return (shrink("gpt2", 3, attention=heads, max_positions=163),
          transformers.GPT2Config(
              vocab_size=VOCAB, n_positions=163, n_embd=D_MODEL, n_layer=3,
              n_head=5, n_inner=D_FF))


def _llama():
  rope = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0,
              low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)
  return (shrink("llama3.1-8b", 3),
          transformers.LlamaConfig(
              **REFERENCE_SIZES, num_hidden_layers=3, intermediate_size=D_FF,
              rope_parameters=rope, rms_norm_eps=1e-5,
              max_position_embeddings=131072))


def _qwen2():
  return (shrink("qwen2.5-7b", 3),
          transformers.Qwen2Config(
              **REFERENCE_SIZES, num_hidden_layers=3, intermediate_size=D_FF,
              rope_parameters=dict(rope_type="default", rope_theta=1e6)))


def _qwen3(name, tied):
  return (shrink(name, 3),
          transformers.Qwen3Config(
              **REFERENCE_SIZES, num_hidden_layers=3, intermediate_size=D_FF,
              tie_word_embeddings=tied,
              rope_parameters=dict(rope_type="default", rope_theta=1e6)))


def _qwen3_moe(renormalize, theta, name):
  router = dataclasses.replace(jaxlm.preset(name).moe.router,
                               renormalize=renormalize)
  return (shrink(name, 3, moe=dict(router=router)),
          transformers.Qwen3MoeConfig(
              **REFERENCE_SIZES, num_hidden_layers=3,
              moe_intermediate_size=D_FF, num_experts=EXPERTS,
              num_experts_per_tok=PER_TOKEN, norm_topk_prob=renormalize,
              rope_parameters=dict(rope_type="default", rope_theta=theta)))


def _mixtral():
  return (shrink("mixtral-8x7b", 3),
          transformers.MixtralConfig(
              **REFERENCE_SIZES, num_hidden_layers=3, intermediate_size=D_FF,
              num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN))


def _gemma2():
  small = dict(sliding_window=37, soft_cap=2.5, scale=31 ** -0.5)
  return (shrink("gemma2-27b", 4, attention=small, final_soft_cap=1.5),
          transformers.Gemma2Config(
              **REFERENCE_SIZES, num_hidden_layers=4, intermediate_size=D_FF,
              sliding_window=37, query_pre_attn_scalar=31,
              attn_logit_softcapping=2.5, final_logit_softcapping=1.5))


def _gemma3():
  small = dict(sliding_window=19, scale=31 ** -0.5)
  rope = dict(
      sliding_attention=dict(rope_type="default", rope_theta=10000.0),
      full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6))
  # Two whole periods and two layers of a third.
  return (shrink("gemma3-27b", 14, attention=small),
          transformers.Gemma3TextConfig(
              **REFERENCE_SIZES, num_hidden_layers=14, intermediate_size=D_FF,
              sliding_window=19, query_pre_attn_scalar=31,
              rope_parameters=rope))


def _gpt_oss():
  rope = dict(rope_type="yarn", rope_theta=150000.0, factor=32.0,
              beta_fast=32.0, beta_slow=1.0, truncate=False,
              original_max_position_embeddings=4096)
  return (shrink("gpt-oss-20b", 4),
          transformers.GptOssConfig(
              **REFERENCE_SIZES, num_hidden_layers=4, intermediate_size=D_FF,
              num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN,
              rope_parameters=rope, sliding_window=128))


def _deepseek_v3(q_rank, scaled):
  """Published, or with all that is optional left away."""
  preset = jaxlm.preset("deepseek-v3")
  rope, router = preset.attention.rope, preset.moe.router
  theirs = dict(rope_type="default", rope_theta=10000.0)
  if scaled:
    scaling = dataclasses.replace(rope.scaling, mscale=0.7, mscale_all_dim=1.3)
    rope = dataclasses.replace(rope, scaling=scaling)
    router = dataclasses.replace(router, num_groups=3, groups_per_token=2)
    theirs = dict(rope_type="yarn", rope_theta=10000.0, factor=40.0,
                  beta_fast=32, beta_slow=1, mscale=0.7, mscale_all_dim=1.3,
                  original_max_position_embeddings=4096)
  else:
    rope = jaxlm.RopeConfig(10000.0)
    router = dataclasses.replace(
        router, num_groups=1, groups_per_token=1, renormalize=False,
        weight_scale=1.5)
  return (
      shrink("deepseek-v3", 5, attention=dict(q_rank=q_rank, rope=rope),
             mlp=MLPConfig(31), num_dense_layers=2,
             moe=dict(num_experts=12, router=router,
                      shared=MLPConfig(2 * D_FF))),
      transformers.DeepseekV3Config(
          vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=5,
          first_k_dense_replace=2, intermediate_size=31,
          moe_intermediate_size=D_FF, num_attention_heads=HEADS,
          num_key_value_heads=HEADS, q_lora_rank=q_rank, kv_lora_rank=19,
          qk_nope_head_dim=11, qk_rope_head_dim=10, v_head_dim=13,
          n_routed_experts=12, n_shared_experts=2,
          num_experts_per_tok=PER_TOKEN, n_group=3 if scaled else 1,
          topk_group=2 if scaled else 1, norm_topk_prob=scaled,
          routed_scaling_factor=2.5 if scaled else 1.5,
          rope_interleave=scaled, rope_parameters=theirs,
          num_nextn_predict_layers=0))


CASES = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3_tied": functools.partial(_qwen3, "qwen3-0.6b", True),
    "qwen3_untied": functools.partial(_qwen3, "qwen3-8b", False),
    "qwen3_moe": functools.partial(_qwen3_moe, True, 1e6, "qwen3-30b-a3b"),
    "qwen3_moe_not_renormalized": functools.partial(
        _qwen3_moe, False, 1e7, "qwen3-30b-a3b-2507"),
    "mixtral": _mixtral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": functools.partial(_deepseek_v3, 33, True),
    "deepseek_v3_plain": functools.partial(_deepseek_v3, None, False),
}


class Case(typing.NamedTuple):
  config: ModelConfig
  params: dict
  tokens_BT: np.ndarray
  logits_BTV: np.ndarray


@functools.cache
def reference_model(name: str):
  """Our config, and transformers' model."""
  config, reference = CASES[name]()
  with torch.random.fork_rng():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        reference, dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager").eval()
    randomize(model, norm_center=1 - config.norm.scale_offset)
  return config, model


@functools.cache
def case(name: str) -> Case:
  """Our config and parameters, and the logits that transformers computes."""
  config, model = reference_model(name)
  tokens_BT = np.random.default_rng(1).integers(0, VOCAB, (BATCH, LENGTH))
  with torch.no_grad():
    logits_BTV = model(torch.tensor(tokens_BT), use_cache=False).logits
  params = params_of(config, named_weights(model))
  return Case(config, params, tokens_BT, logits_BTV.numpy())


def named_weights(model) -> dict:
  return dict(model.named_parameters()) | balance_biases(model)


def balance_biases(model) -> dict:
  """DeepSeek's balance bias is a buffer, which no gradient reaches."""
  return {name: b for name, b in model.named_buffers()
          if name.endswith("e_score_correction_bias")}


@torch.no_grad()
def randomize(model, norm_center: float):
  """Weights under which everything matters: attention is far from uniform,
  gates reach the clamp, embeddings are small enough to feel the norm's eps."""
  for name, w in model.named_parameters():
    if name.endswith("bias"):
      w.normal_(0, 0.5)
    elif name.endswith("sinks"):
      w.normal_(2, 2)
    elif w.ndim == 1:
      w.uniform_(norm_center - 0.5, norm_center + 0.5)
    elif "embed" in name or "wte" in name or "wpe" in name:
      w.normal_(0, 0.02)
    else:
      gain = 3 if "gate_up" in name else 1.5
      w.normal_(0, gain * D_MODEL ** -0.5)
  for b in balance_biases(model).values():
    b.normal_(0, 0.3)


def our_logits(config: ModelConfig, params, tokens_BT,
               execution=jaxlm.Execution()):
  hidden_BTD = jaxlm.forward(config, params, tokens_BT,
                             execution=execution).hidden_BTD
  return jaxlm.logits(config, params, hidden_BTD)


def relative_difference(ours, theirs) -> float:
  """The largest difference, as a share of the largest value."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
