"""Gemma 2 (arXiv 2408.00118)."""
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, NormConfig,
                          RopeConfig)
from jaxlm.families.common import (ATTENTION_RULES, OUTER_RULES,
                                   PRE_AND_POST_NORM_RULES, attention,
                                   mlp_rules, outer, query_scale,
                                   query_scalar, to_hf)
from jaxlm.families.family import Family
from jaxlm.families.hf_config import Fields, activation_name, layer_types


def gemma2(num_layers: int, d_model: int, d_ff: int, num_heads: int,
           num_kv_heads: int, head_dim: int,
           scale: float | None = None) -> ModelConfig:
  rope = RopeConfig(10000.0)
  return ModelConfig(
      vocab_size=256000, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(
          num_heads, num_kv_heads, head_dim, rope_full=rope, rope_sliding=rope,
          sliding_window=4096, soft_cap=50.0, scale=scale),
      mlp=MLPConfig(d_ff, "gelu_tanh"), layer_pattern=("sliding", "full"),
      norm=NormConfig(scale_offset=1.0, placement="pre_and_post"),
      tie_embeddings=True, scale_embeddings=True, final_soft_cap=30.0)


PRESETS = {
    "gemma2-2b": gemma2(26, 2304, 9216, 8, 4, 256),
    "gemma2-9b": gemma2(42, 3584, 14336, 16, 8, 256),
    "gemma2-27b": gemma2(46, 4608, 36864, 32, 16, 128,
                         scale=(4608 / 32) ** -0.5),
}


DEFAULTS = dict(attention_bias=False, hidden_activation="gelu_pytorch_tanh",
                head_dim=256, num_key_value_heads=4, rms_norm_eps=1e-6,
                rope_theta=10000.0, query_pre_attn_scalar=256,
                sliding_window=4096, attn_logit_softcapping=50.0,
                final_logit_softcapping=30.0, max_position_embeddings=8192,
                tie_word_embeddings=True)
RULES = (*OUTER_RULES, *PRE_AND_POST_NORM_RULES, *ATTENTION_RULES,
         *mlp_rules("mlp", "mlp"))


def from_hf_config(values: dict) -> ModelConfig:
  fields = Fields(values, DEFAULTS)
  fields.ignore("hidden_act", "sliding_window_size")
  fields.only("use_bidirectional_attention", None, False)
  pattern = fields.layer_pattern(lambda i: i % 2 == 0)
  config = ModelConfig(
      **outer(fields), layer_pattern=pattern,
      attention=attention(
          fields, pattern, sliding_window=fields.optional("sliding_window"),
          soft_cap=fields.optional("attn_logit_softcapping", float),
          scale=query_scale(fields)),
      **around_attention(fields))
  fields.finish()
  return config


def around_attention(fields: Fields) -> dict:
  """What Gemma 2 and 3 share of their ModelConfig."""
  return dict(
      mlp=MLPConfig(fields("intermediate_size"),
                    fields.activation("hidden_activation")),
      norm=NormConfig(eps=fields("rms_norm_eps", float), scale_offset=1.0,
                      placement="pre_and_post"),
      scale_embeddings=True,
      final_soft_cap=fields.optional("final_logit_softcapping", float))


def to_hf_config(config: ModelConfig) -> dict:
  return to_hf(
      config, intermediate_size=config.mlp.d_ff,
      hidden_activation=activation_name(config.mlp, "gelu_pytorch_tanh"),
      layer_types=layer_types(config),
      sliding_window=config.attention.sliding_window,
      query_pre_attn_scalar=query_scalar(config),
      attn_logit_softcapping=config.attention.soft_cap,
      final_logit_softcapping=config.final_soft_cap)


FAMILY = Family("gemma2", "Gemma2ForCausalLM", from_hf_config, to_hf_config,
                RULES)
