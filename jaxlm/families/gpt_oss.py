"""gpt-oss (arXiv 2508.10925)."""
from jaxlm.config import (PROJECTIONS, AttentionConfig, MLPConfig, MoEConfig,
                          ModelConfig, NormConfig, RopeConfig, RouterConfig,
                          YarnScaling)


def gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
  rope = RopeConfig(150000.0, YarnScaling(
      factor=32.0, original_context=4096, beta_fast=32.0, beta_slow=1.0,
      truncate=False))
  expert = MLPConfig(2880, "clamped_swiglu", bias=True, interleaved=True,
                     swiglu_limit=7.0)
  return ModelConfig(
      vocab_size=201088, d_model=2880, num_layers=num_layers,
      attention=AttentionConfig(
          64, 8, 64, rope_full=rope, rope_sliding=rope, sliding_window=128,
          biases=PROJECTIONS, sinks=True),
      moe=MoEConfig(num_experts, 4, expert,
                    RouterConfig("topk_softmax", bias=True)),
      layer_pattern=("sliding", "full"), norm=NormConfig(eps=1e-5))


PRESETS = {"gpt-oss-20b": gpt_oss(24, 32), "gpt-oss-120b": gpt_oss(36, 128)}
