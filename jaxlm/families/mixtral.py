"""Mixtral (arXiv 2401.04088)."""
from jaxlm.config import (AttentionConfig, MLPConfig, MoEConfig, ModelConfig,
                          NormConfig, RopeConfig, RouterConfig)


def mixtral(num_layers: int, d_model: int, d_expert: int, num_heads: int,
            num_kv_heads: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=32000, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, num_kv_heads, d_model // num_heads,
                                RopeConfig(1e6)),
      moe=MoEConfig(8, 2, MLPConfig(d_expert), RouterConfig("topk_softmax")),
      norm=NormConfig(eps=1e-5))


PRESETS = {"mixtral-8x7b": mixtral(32, 4096, 14336, 32, 8)}
