"""Quantized weights as leaves of the parameters."""
from pallas_kernels.quant.fp8 import FP8
from pallas_kernels.quant.int8 import Int8
from pallas_kernels.quant.leaf import (QuantizationError, Quantized,
                                       is_quantized, quantization_error)
from pallas_kernels.quant.mxfp4 import MXFP4
from pallas_kernels.quant.mxfp4_pairs import MXFP4Pairs

FORMATS = {"mxfp4": MXFP4, "int8": Int8, "fp8": FP8}
# The kind of leaf that an array is part of, by the last part of its path.
KINDS = {part: kind for kind in FORMATS.values() for part in kind.PARTS}


def quantized_leaves(paths) -> dict[str, type[Quantized]]:
  """The leaves whose parts are among these paths, with their kinds."""
  found = {}
  for path in paths:
    leaf, _, part = path.rpartition("/")
    if part in KINDS:
      found[leaf] = KINDS[part]
  return found
