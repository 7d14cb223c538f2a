"""Gemma 2 (arXiv 2408.00118)."""
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, NormConfig,
                          RopeConfig)


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
