"""Qwen3, dense (arXiv 2505.09388)."""
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, NormConfig,
                          RopeConfig)
from jaxlm.families.common import (LLAMA_RULES, attention, outer,
                                   sliding_fields, sliding_pattern, to_hf)
from jaxlm.families.family import Family
from jaxlm.families.hf_config import Fields, activation_name


def qwen3(num_layers: int, d_model: int, d_ff: int, num_heads: int,
          tie_embeddings: bool) -> ModelConfig:
  return ModelConfig(
      vocab_size=151936, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, 8, 128, RopeConfig(1e6),
                                qk_norm=True),
      mlp=MLPConfig(d_ff), tie_embeddings=tie_embeddings)


PRESETS = {
    "qwen3-0.6b": qwen3(28, 1024, 3072, 16, True),
    "qwen3-1.7b": qwen3(28, 2048, 6144, 16, True),
    "qwen3-4b": qwen3(36, 2560, 9728, 32, True),
    "qwen3-8b": qwen3(36, 4096, 12288, 32, False),
    "qwen3-14b": qwen3(40, 5120, 17408, 40, False),
    "qwen3-32b": qwen3(64, 5120, 25600, 64, False),
}

DEFAULTS = dict(attention_bias=False, head_dim=128, hidden_act="silu",
                rms_norm_eps=1e-6, rope_theta=10000.0,
                use_sliding_window=False, max_window_layers=28,
                max_position_embeddings=32768, tie_word_embeddings=False)


def from_hf_config(values: dict) -> ModelConfig:
  fields = Fields(values, DEFAULTS)
  pattern, window = sliding_pattern(fields)
  config = ModelConfig(
      **outer(fields), layer_pattern=pattern,
      attention=attention(fields, pattern, sliding_window=window,
                          qk_norm=True),
      mlp=MLPConfig(fields("intermediate_size"),
                    fields.activation("hidden_act")),
      norm=NormConfig(eps=fields("rms_norm_eps", float)))
  fields.finish()
  return config


def to_hf_config(config: ModelConfig) -> dict:
  return to_hf(config, intermediate_size=config.mlp.d_ff,
               hidden_act=activation_name(config.mlp, "silu"),
               **sliding_fields(config))


FAMILY = Family("qwen3", "Qwen3ForCausalLM", from_hf_config, to_hf_config,
                LLAMA_RULES)
