"""DeepSeek's FP8 checkpoints, read as bfloat16."""
import functools

import ml_dtypes
import numpy as np

from jaxlm.convert.tensors import Tensor
from pallas_kernels.quant.fp8 import BLOCK, FP8

# Follows a tensor's name in that of its scales, by which it is multiplied.
_SCALES = "_scale_inv"


def dequantized(tensors: dict[str, Tensor],
                quantization: dict) -> dict[str, Tensor]:
  """The tensors, those in FP8 with their scales as one in bfloat16.

  Args:
    quantization: what config.json says of it.

  Raises:
    ValueError: scales are missing or do not fit.
    NotImplementedError: the scales are of other blocks.
  """
  block = quantization.get("weight_block_size")
  if block != [BLOCK, BLOCK]:
    raise NotImplementedError(
        f"config.json: quantization_config has weight_block_size={block}, "
        f"only {[BLOCK, BLOCK]} is supported")
  result = dict(tensors)
  for name, values in tensors.items():
    if values.dtype != ml_dtypes.float8_e4m3fn:
      continue
    scales = result.pop(name + _SCALES, None)
    shape = tuple(-(-size // BLOCK) for size in values.shape)
    if (scales is None or scales.shape != shape or len(shape) != 2
        or scales.dtype != np.float32):
      found = (f"are {scales.dtype} {list(scales.shape)}" if scales
               else "are missing")
      raise ValueError(f"{name} is FP8 {list(values.shape)}, but its scales, "
                       f"{name + _SCALES}, {found}: expected a matrix and "
                       f"float32 {list(shape)}")
    result[name] = Tensor(values.shape, np.dtype(ml_dtypes.bfloat16),
                          functools.partial(_read, values, scales))
  return result


def _read(values: Tensor, scales: Tensor) -> np.ndarray:
  return FP8(values.read(), scales.read()).dequantize().swapaxes(-1, -2)
