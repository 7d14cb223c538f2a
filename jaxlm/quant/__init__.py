"""Quantized weights as leaves of the parameters."""
from jaxlm.quant.fp8 import FP8
from jaxlm.quant.int8 import Int8
from jaxlm.quant.leaf import (QuantizationError, Quantized, is_quantized,
                              quantization_error)
from jaxlm.quant.mxfp4 import MXFP4

FORMATS = {"mxfp4": MXFP4, "int8": Int8, "fp8": FP8}
