"""DeepSeek-V3 and R1, the main model (arXiv 2412.19437)."""
import dataclasses

from jaxlm.config import (MLAConfig, MLPConfig, MoEConfig, ModelConfig,
                          NormConfig, RopeConfig, RouterConfig, YarnScaling)
from jaxlm.convert.rules import Rule
from jaxlm.families.common import (OUTER_RULES, PRE_NORM_RULES, mlp_rules,
                                   moe_rules, outer)
from jaxlm.families.family import Family
from jaxlm.families.hf_config import (Fields, activation_name, rope_scaling)

_V3 = ModelConfig(
    vocab_size=129280, d_model=7168, num_layers=61,
    attention=MLAConfig(
        num_heads=128, q_rank=1536, kv_rank=512, nope_head_dim=128,
        rope_head_dim=64, v_head_dim=128,
        rope=RopeConfig(10000.0, YarnScaling(
            factor=40.0, original_context=4096, beta_fast=32.0, beta_slow=1.0,
            truncate=True, mscale=1.0, mscale_all_dim=1.0), interleaved=True)),
    mlp=MLPConfig(18432), num_dense_layers=3,
    moe=MoEConfig(
        256, 8, MLPConfig(2048), shared=MLPConfig(2048),
        router=RouterConfig(
            "sigmoid_topk", renormalize=True, balance_bias=True, num_groups=8,
            groups_per_token=4, weight_scale=2.5)))

# R1 is V3 trained further.
PRESETS = {"deepseek-v3": _V3, "deepseek-r1": _V3}

_THEIRS = "model.layers.{layer}.self_attn"
LATENT_RULES = tuple(
    Rule("layers/{layer}/attention/" + ours, f"{_THEIRS}.{theirs}.weight",
         pattern)
    for ours, theirs, pattern in (
        ("q_proj", "q_proj", "(N H) D -> D N H"),
        ("q_a_proj", "q_a_proj", "R D -> D R"),
        ("q_a_norm/scale", "q_a_layernorm", "R -> R"),
        ("q_b_proj", "q_b_proj", "(N H) R -> R N H"),
        ("kv_a_proj", "kv_a_proj_with_mqa", "R D -> D R"),
        ("kv_a_norm/scale", "kv_a_layernorm", "R -> R"),
        ("kv_b_proj", "kv_b_proj", "(N H) R -> R N H"),
        ("o_proj", "o_proj", "D (N H) -> N H D")))

DEFAULTS = dict(
    attention_bias=False, first_k_dense_replace=3, hidden_act="silu",
    kv_lora_rank=512, max_position_embeddings=4096, n_group=8,
    n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
    num_experts_per_tok=8, q_lora_rank=1536, qk_nope_head_dim=128,
    qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_interleave=True,
    rope_theta=10000.0, routed_scaling_factor=2.5, tie_word_embeddings=False,
    topk_group=4, v_head_dim=128)


def from_hf_config(values: dict) -> ModelConfig:
  # Null means that there is none, not the default.
  fields = Fields(values, DEFAULTS | {name: None for name, value
                                      in values.items() if value is None})
  for name, supported in (("attention_bias", False), ("moe_layer_freq", 1),
                          ("scoring_func", "sigmoid"),
                          ("topk_method", "noaux_tc")):
    fields.only(name, supported, default=supported)
  # Repeated by others, of training, or of what is left out.
  fields.ignore("aux_loss_alpha", "ep_size", "head_dim",
                "num_key_value_heads", "num_nextn_predict_layers",
                "qk_head_dim", "seq_aux")
  num_dense = fields("first_k_dense_replace")
  config = ModelConfig(
      **outer(fields), attention=_attention(fields),
      mlp=_mlp(fields, fields("intermediate_size")) if num_dense else None,
      num_dense_layers=num_dense, moe=_moe(fields),
      norm=NormConfig(eps=fields("rms_norm_eps", float)))
  fields.finish()
  return config


def _attention(fields: Fields) -> MLAConfig:
  rope = dataclasses.replace(fields.rope("full"), interleaved=fields(
      "rope_interleave", bool))
  return MLAConfig(
      fields("num_attention_heads"), fields("kv_lora_rank"),
      fields("qk_nope_head_dim"), fields("qk_rope_head_dim"),
      fields("v_head_dim"), fields.optional("q_lora_rank"), rope)


def _mlp(fields: Fields, d_ff: int) -> MLPConfig:
  return MLPConfig(d_ff, fields.activation("hidden_act"))


def _moe(fields: Fields) -> MoEConfig:
  d_expert = fields("moe_intermediate_size")
  return MoEConfig(
      fields("n_routed_experts"), fields("num_experts_per_tok"),
      _mlp(fields, d_expert),
      RouterConfig(
          "sigmoid_topk", renormalize=fields("norm_topk_prob", bool),
          balance_bias=True, num_groups=fields("n_group"),
          groups_per_token=fields("topk_group"),
          weight_scale=fields("routed_scaling_factor", float)),
      _mlp(fields, fields("n_shared_experts") * d_expert))


def to_hf_config(config: ModelConfig) -> dict:
  c, moe, router = config.attention, config.moe, config.moe.router
  mlp, shared = (x or moe.expert for x in (config.mlp, moe.shared))
  return dict(
      vocab_size=config.vocab_size, hidden_size=config.d_model,
      num_hidden_layers=config.num_layers, rms_norm_eps=config.norm.eps,
      tie_word_embeddings=config.tie_embeddings, attention_bias=False,
      num_attention_heads=c.num_heads, num_key_value_heads=c.num_heads,
      q_lora_rank=c.q_rank, kv_lora_rank=c.kv_rank,
      qk_nope_head_dim=c.nope_head_dim, qk_rope_head_dim=c.rope_head_dim,
      v_head_dim=c.v_head_dim, rope_theta=c.rope.theta,
      rope_scaling=rope_scaling(c.rope), rope_interleave=c.rope.interleaved,
      hidden_act=activation_name(moe.expert, "silu"),
      first_k_dense_replace=config.num_dense_layers, moe_layer_freq=1,
      intermediate_size=mlp.d_ff, moe_intermediate_size=moe.expert.d_ff,
      n_routed_experts=moe.num_experts,
      n_shared_experts=shared.d_ff // moe.expert.d_ff,
      num_experts_per_tok=moe.experts_per_token, n_group=router.num_groups,
      topk_group=router.groups_per_token, norm_topk_prob=router.renormalize,
      routed_scaling_factor=router.weight_scale, scoring_func="sigmoid",
      topk_method="noaux_tc", num_nextn_predict_layers=0)


FAMILY = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", from_hf_config, to_hf_config,
    (*OUTER_RULES, *PRE_NORM_RULES, *LATENT_RULES, *mlp_rules("mlp", "mlp"),
     *moe_rules("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
     Rule("layers/{layer}/moe/balance_bias",
          "model.layers.{layer}.mlp.gate.e_score_correction_bias", "E -> E"),
     *mlp_rules("moe/shared", "mlp.shared_experts")),
    moe=True, attention=MLAConfig, predicts_further=True)
