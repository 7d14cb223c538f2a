"""GPT-2 (Radford et al. 2019)."""
from jaxlm.config import (PROJECTIONS, AttentionConfig, MLPConfig, ModelConfig,
                          NormConfig)


def gpt2(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=50257, d_model=d_model, num_layers=num_layers,
      attention=AttentionConfig(num_heads, num_heads, d_model // num_heads,
                                biases=PROJECTIONS),
      mlp=MLPConfig(4 * d_model, "gelu_tanh", gated=False, bias=True),
      norm=NormConfig("layernorm", eps=1e-5), max_positions=1024,
      tie_embeddings=True, dropout=0.1)


PRESETS = {
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
}
