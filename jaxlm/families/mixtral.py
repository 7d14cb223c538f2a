"""Mixtral (arXiv 2401.04088)."""
from jaxlm.config import (AttentionConfig, MLPConfig, MoEConfig, ModelConfig,
                          NormConfig, RopeConfig, RouterConfig)
from jaxlm.families.common import (ATTENTION_RULES, OUTER_RULES,
                                   PRE_NORM_RULES, attention, moe_rules, outer,
                                   to_hf)
from jaxlm.families.family import Family
from jaxlm.families.hf_config import Fields, activation_name


def mixtral(num_layers: int, d_model: int, d_expert: int, num_heads: int,
            num_kv_heads: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=32000, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, num_kv_heads, d_model // num_heads,
                                RopeConfig(1e6)),
      moe=MoEConfig(8, 2, MLPConfig(d_expert), RouterConfig("topk_softmax")),
      norm=NormConfig(eps=1e-5))


PRESETS = {"mixtral-8x7b": mixtral(32, 4096, 14336, 32, 8)}


DEFAULTS = dict(hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e6,
                num_local_experts=8, num_experts_per_tok=2,
                max_position_embeddings=131072, tie_word_embeddings=False)


def from_hf_config(values: dict) -> ModelConfig:
  fields = Fields(values, DEFAULTS)
  window = fields.optional("sliding_window")
  pattern = ("full",) if window is None else ("sliding",)
  config = ModelConfig(
      **outer(fields), layer_pattern=pattern,
      attention=attention(fields, pattern, sliding_window=window, biases=()),
      moe=MoEConfig(
          fields("num_local_experts"), fields("num_experts_per_tok"),
          MLPConfig(fields("intermediate_size"),
                    fields.activation("hidden_act")),
          RouterConfig("topk_softmax")),
      norm=NormConfig(eps=fields("rms_norm_eps", float)))
  fields.finish()
  return config


def to_hf_config(config: ModelConfig) -> dict:
  moe = config.moe
  values = to_hf(config, intermediate_size=moe.expert.d_ff,
                 hidden_act=activation_name(moe.expert, "silu"),
                 num_local_experts=moe.num_experts,
                 num_experts_per_tok=moe.experts_per_token,
                 sliding_window=config.attention.sliding_window)
  del values["attention_bias"]
  return values


FAMILY = Family(
    "mixtral", "MixtralForCausalLM", from_hf_config, to_hf_config,
    (*OUTER_RULES, *PRE_NORM_RULES, *ATTENTION_RULES,
     *moe_rules("block_sparse_moe", gate="w1", up="w3", down="w2")), moe=True)
