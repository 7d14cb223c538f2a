"""Llama 3.1 (arXiv 2407.21783)."""
from jaxlm.config import (AttentionConfig, Llama3Scaling, MLPConfig,
                          ModelConfig, NormConfig, RopeConfig)
from jaxlm.families.common import LLAMA_RULES, attention, outer, to_hf
from jaxlm.families.family import Family
from jaxlm.families.hf_config import Fields, activation_name


def llama(num_layers: int, d_model: int, d_ff: int, num_heads: int,
          num_kv_heads: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=128256, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, num_kv_heads, d_model // num_heads,
                                RopeConfig(500000.0, Llama3Scaling())),
      mlp=MLPConfig(d_ff), norm=NormConfig(eps=1e-5))


PRESETS = {"llama3.1-8b": llama(32, 4096, 14336, 32, 8)}

DEFAULTS = dict(attention_bias=False, mlp_bias=False, hidden_act="silu",
                rms_norm_eps=1e-6, rope_theta=10000.0,
                max_position_embeddings=2048, tie_word_embeddings=False)


def from_hf_config(values: dict) -> ModelConfig:
  fields = Fields(values, DEFAULTS)
  config = ModelConfig(
      **outer(fields), attention=attention(fields),
      mlp=MLPConfig(fields("intermediate_size"),
                    fields.activation("hidden_act"),
                    bias=fields("mlp_bias", bool)),
      norm=NormConfig(eps=fields("rms_norm_eps", float)))
  fields.finish()
  return config


def to_hf_config(config: ModelConfig) -> dict:
  return to_hf(config, intermediate_size=config.mlp.d_ff,
               hidden_act=activation_name(config.mlp, "silu"),
               mlp_bias=config.mlp.bias)


FAMILY = Family("llama", "LlamaForCausalLM", from_hf_config, to_hf_config,
                LLAMA_RULES)
