"""gpt-oss (arXiv 2508.10925)."""
from jaxlm.config import (PROJECTIONS, AttentionConfig, MLPConfig, MoEConfig,
                          ModelConfig, NormConfig, RopeConfig, RouterConfig,
                          YarnScaling)
from jaxlm.convert.rules import Rule
from jaxlm.families.common import (ATTENTION_RULES, OUTER_RULES,
                                   PRE_NORM_RULES, attention, outer, to_hf)
from jaxlm.families.family import Family
from jaxlm.families.hf_config import Fields, layer_types


def gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
  rope = RopeConfig(150000.0, YarnScaling(
      factor=32.0, original_context=4096, beta_fast=32.0, beta_slow=1.0,
      truncate=False))
  expert = MLPConfig(2880, "clamped_swiglu", bias=True, interleaved=True,
                     swiglu_limit=7.0)
  return ModelConfig(
      vocab_size=201088, d_model=2880, num_layers=num_layers,
      attention=AttentionConfig(
          64, 8, 64, rope_full=rope, rope_sliding=rope, sliding_window=128,
          biases=PROJECTIONS, sinks=True),
      moe=MoEConfig(num_experts, 4, expert,
                    RouterConfig("topk_softmax", bias=True)),
      layer_pattern=("sliding", "full"), norm=NormConfig(eps=1e-5))


PRESETS = {"gpt-oss-20b": gpt_oss(24, 32), "gpt-oss-120b": gpt_oss(36, 128)}


_THEIRS = "model.layers.{layer}.mlp"
MOE_RULES = tuple(
    Rule("layers/{layer}/moe/" + ours, f"{_THEIRS}.{theirs}", pattern)
    for ours, theirs, pattern in (
        ("router", "router.weight", "E D -> D E"),
        ("router_bias", "router.bias", "E -> E"),
        ("gate_up", "experts.gate_up_proj", "E D F -> E D F"),
        ("gate_up_bias", "experts.gate_up_proj_bias", "E F -> E F"),
        ("down", "experts.down_proj", "E F D -> E F D"),
        ("down_bias", "experts.down_proj_bias", "E D -> E D"),
        # In MXFP4: blocks of 32 inputs (J) in 16 bytes (B) and a scale.
        ("gate_up/blocks", "experts.gate_up_proj_blocks",
         "E F J B -> E F J B"),
        ("gate_up/scales", "experts.gate_up_proj_scales", "E F J -> E F J"),
        ("down/blocks", "experts.down_proj_blocks", "E D J B -> E D J B"),
        ("down/scales", "experts.down_proj_scales", "E D J -> E D J")))

DEFAULTS = dict(attention_bias=True, rms_norm_eps=1e-5, rope_theta=150000.0,
                sliding_window=128, swiglu_limit=7.0, head_dim=64,
                max_position_embeddings=131072, tie_word_embeddings=False,
                rope_parameters={
                    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0,
                    "beta_slow": 1.0, "truncate": False,
                    "original_max_position_embeddings": 4096})


def from_hf_config(values: dict) -> ModelConfig:
  fields = Fields(values, DEFAULTS)
  fields.only("hidden_act", "silu", default="silu")
  fields.only("swiglu_alpha", 1.702, default=1.702)
  # Said twice: in rope_scaling and in num_experts_per_tok.
  fields.ignore("initial_context_length", "experts_per_token")
  pattern = fields.layer_pattern(lambda i: i % 2 == 0)
  expert = MLPConfig(fields("intermediate_size"), "clamped_swiglu", bias=True,
                     interleaved=True,
                     swiglu_limit=fields("swiglu_limit", float))
  config = ModelConfig(
      **outer(fields), layer_pattern=pattern,
      attention=attention(
          fields, pattern, sliding_window=fields.optional("sliding_window"),
          sinks=True),
      moe=MoEConfig(fields("num_local_experts"), fields("num_experts_per_tok"),
                    expert, RouterConfig("topk_softmax", bias=True)),
      norm=NormConfig(eps=fields("rms_norm_eps", float)))
  fields.finish()
  return config


def to_hf_config(config: ModelConfig) -> dict:
  values = to_hf(
      config, intermediate_size=config.moe.expert.d_ff, hidden_act="silu",
      swiglu_limit=config.moe.expert.swiglu_limit,
      num_local_experts=config.moe.num_experts,
      num_experts_per_tok=config.moe.experts_per_token,
      sliding_window=config.attention.sliding_window,
      layer_types=layer_types(config))
  # Without a scaling this class takes the published one.
  values["rope_scaling"] = values["rope_scaling"] or {"rope_type": "default"}
  return values


FAMILY = Family(
    "gpt_oss", "GptOssForCausalLM", from_hf_config, to_hf_config,
    (*OUTER_RULES, *PRE_NORM_RULES, *ATTENTION_RULES, *MOE_RULES), moe=True)
