"""Qwen2.5 (arXiv 2412.15115)."""
from jaxlm.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig


def qwen2(num_layers: int, d_model: int, d_ff: int, num_heads: int,
          num_kv_heads: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=152064, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, num_kv_heads, d_model // num_heads,
                                RopeConfig(1e6), biases=("q", "k", "v")),
      mlp=MLPConfig(d_ff))


PRESETS = {"qwen2.5-7b": qwen2(28, 3584, 18944, 28, 4)}
