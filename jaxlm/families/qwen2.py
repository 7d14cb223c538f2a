"""Qwen2.5 (arXiv 2412.15115)."""
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, NormConfig,
                          RopeConfig)
from jaxlm.families.common import (LLAMA_RULES, attention, outer,
                                   sliding_fields, sliding_pattern, to_hf)
from jaxlm.families.family import Family
from jaxlm.families.hf_config import Fields, activation_name


def qwen2(num_layers: int, d_model: int, d_ff: int, num_heads: int,
          num_kv_heads: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=152064, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, num_kv_heads, d_model // num_heads,
                                RopeConfig(1e6), biases=("q", "k", "v")),
      mlp=MLPConfig(d_ff))


PRESETS = {"qwen2.5-7b": qwen2(28, 3584, 18944, 28, 4)}


DEFAULTS = dict(hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0,
                use_sliding_window=False, max_window_layers=28,
                max_position_embeddings=32768, tie_word_embeddings=False)


def from_hf_config(values: dict) -> ModelConfig:
  fields = Fields(values, DEFAULTS)
  pattern, window = sliding_pattern(fields)
  config = ModelConfig(
      **outer(fields), layer_pattern=pattern,
      attention=attention(fields, pattern, sliding_window=window,
                          biases=("q", "k", "v")),
      mlp=MLPConfig(fields("intermediate_size"),
                    fields.activation("hidden_act")),
      norm=NormConfig(eps=fields("rms_norm_eps", float)))
  fields.finish()
  return config


def to_hf_config(config: ModelConfig) -> dict:
  values = to_hf(config, intermediate_size=config.mlp.d_ff,
                 hidden_act=activation_name(config.mlp, "silu"),
                 **sliding_fields(config))
  del values["attention_bias"]  # Always there, for q, k and v.
  return values


FAMILY = Family("qwen2", "Qwen2ForCausalLM", from_hf_config, to_hf_config,
                LLAMA_RULES)
