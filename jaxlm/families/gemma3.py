"""Gemma 3, the text decoder (arXiv 2503.19786)."""
from jaxlm.config import (AttentionConfig, LinearScaling, MLPConfig,
                          ModelConfig, NormConfig, RopeConfig)


def gemma3(num_layers: int, d_model: int, d_ff: int, num_heads: int,
           num_kv_heads: int, head_dim: int = 256, sliding_window: int = 1024,
           position_scale: float | None = 8.0,
           scale: float | None = None,
           vocab_size: int = 262208) -> ModelConfig:
  """The vocabulary is 262144, which the published 4B, 12B and 27B pad."""
  scaling = None if position_scale is None else LinearScaling(position_scale)
  return ModelConfig(
      vocab_size=vocab_size, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(
          num_heads, num_kv_heads, head_dim,
          rope_full=RopeConfig(1e6, scaling), rope_sliding=RopeConfig(1e4),
          sliding_window=sliding_window, qk_norm=True, scale=scale),
      mlp=MLPConfig(d_ff, "gelu_tanh"),
      layer_pattern=("sliding",) * 5 + ("full",),
      norm=NormConfig(scale_offset=1.0, placement="pre_and_post"),
      tie_embeddings=True, scale_embeddings=True)


PRESETS = {
    "gemma3-1b": gemma3(26, 1152, 6912, 4, 1, sliding_window=512,
                        position_scale=None, vocab_size=262144),
    "gemma3-4b": gemma3(34, 2560, 10240, 8, 4),
    "gemma3-12b": gemma3(48, 3840, 15360, 16, 8),
    "gemma3-27b": gemma3(62, 5376, 21504, 32, 16, head_dim=128,
                         scale=168 ** -0.5),
}
