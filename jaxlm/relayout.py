"""Parameters in the layout that the platform they run on is fast with.

On a TPU that is `MXFP4Pairs` for experts in MXFP4; elsewhere everything is as
published. Both hold the same bits, so checkpoints are as published always.
"""
import jax

from jaxlm.config import ModelConfig
from pallas_kernels.quant import MXFP4, MXFP4Pairs, is_quantized


def relayout(config: ModelConfig, params: dict, platform: str) -> dict:
  """The same parameters for "tpu", or for "cpu" or "gpu": as published.

  `params` in any form (stacks, per layer, a part of either), of arrays on the
  host or on a device, or of ShapeDtypeStructs under `jax.eval_shape`.
  """
  def visit(path, leaf):
    return relayout_leaf(config, path[-1].key, leaf, platform)
  return jax.tree_util.tree_map_with_path(
      visit, params, is_leaf=is_quantized)


def relayout_leaf(config: ModelConfig, name: str, leaf, platform: str):
  """One leaf, called `name`. In a first matmul whose outputs gate and up
  alternate they are taken apart, so that a tile holds both."""
  if platform == "tpu" and isinstance(leaf, MXFP4):
    expert = config.moe.expert
    alternate = (name == "gate_up" and expert.interleaved
                 and expert.activation == "clamped_swiglu")
    return MXFP4Pairs.from_mxfp4(leaf, deinterleave=alternate)
  if platform != "tpu" and isinstance(leaf, MXFP4Pairs):
    return leaf.to_mxfp4()
  return leaf
