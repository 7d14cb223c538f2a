"""Llama 3.1 (arXiv 2407.21783)."""
from jaxlm.config import (AttentionConfig, Llama3Scaling, MLPConfig,
                          ModelConfig, NormConfig, RopeConfig)


def llama(num_layers: int, d_model: int, d_ff: int, num_heads: int,
          num_kv_heads: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=128256, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, num_kv_heads, d_model // num_heads,
                                RopeConfig(500000.0, Llama3Scaling())),
      mlp=MLPConfig(d_ff), norm=NormConfig(eps=1e-5))


PRESETS = {"llama3.1-8b": llama(32, 4096, 14336, 32, 8)}
