"""Qwen3, dense and mixture of experts (arXiv 2505.09388)."""
from jaxlm.config import (AttentionConfig, MLPConfig, MoEConfig, ModelConfig,
                          RopeConfig, RouterConfig)


def _attention(num_heads: int, num_kv_heads: int,
               rope_theta: float) -> AttentionConfig:
  return AttentionConfig(num_heads, num_kv_heads, 128, RopeConfig(rope_theta),
                         qk_norm=True)


def qwen3(num_layers: int, d_model: int, d_ff: int, num_heads: int,
          tie_embeddings: bool) -> ModelConfig:
  return ModelConfig(
      vocab_size=151936, d_model=d_model, num_layers=num_layers,
      attention=_attention(num_heads, 8, 1e6), mlp=MLPConfig(d_ff),
      tie_embeddings=tie_embeddings)


def qwen3_moe(num_layers: int, d_model: int, d_expert: int, num_heads: int,
              rope_theta: float = 1e6) -> ModelConfig:
  return ModelConfig(
      vocab_size=151936, d_model=d_model, num_layers=num_layers,
      attention=_attention(num_heads, 4, rope_theta),
      moe=MoEConfig(128, 8, MLPConfig(d_expert),
                    RouterConfig("softmax_topk", renormalize=True)))


PRESETS = {
    "qwen3-0.6b": qwen3(28, 1024, 3072, 16, True),
    "qwen3-1.7b": qwen3(28, 2048, 6144, 16, True),
    "qwen3-4b": qwen3(36, 2560, 9728, 32, True),
    "qwen3-8b": qwen3(36, 4096, 12288, 32, False),
    "qwen3-14b": qwen3(40, 5120, 17408, 40, False),
    "qwen3-32b": qwen3(64, 5120, 25600, 64, False),
    "qwen3-30b-a3b": qwen3_moe(48, 2048, 768, 32),
    "qwen3-30b-a3b-2507": qwen3_moe(48, 2048, 768, 32, rope_theta=1e7),
    "qwen3-235b-a22b": qwen3_moe(94, 4096, 1536, 64),
    "qwen3-235b-a22b-2507": qwen3_moe(94, 4096, 1536, 64, rope_theta=5e6),
}
