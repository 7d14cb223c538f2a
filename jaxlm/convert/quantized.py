"""Experts quantized, or no longer, from one checkpoint to another."""
import dataclasses
import re
from collections.abc import Callable

from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes
from jaxlm.convert.tensors import FLOATS, Tensor
from pallas_kernels.quant import (FORMATS, QuantizationError,
                                  quantization_error, quantized_leaves)

_EXPERTS = re.compile(r"layers/\d+/moe/(gate_up|up|down)")


def quantize_experts(
    checkpoint: Checkpoint, kind: str,
    report: Callable[[str, QuantizationError], None] = lambda path, error: None
) -> Checkpoint:
  """The same checkpoint with the matrices of its experts quantized.

  Args:
    kind: "mxfp4", "int8" or "fp8".
    report: called with the path of each and its error, when it is read.

  Raises:
    ValueError: the kind is unknown, or there are no experts that can be.
  """
  if kind not in FORMATS:
    raise ValueError(f"experts cannot be quantized to {kind!r}: use one of "
                     f"{tuple(FORMATS)}")
  already = quantized_leaves(checkpoint.tensors)
  if already:
    raise ValueError(f"{next(iter(already))} is quantized already: begin with "
                     "a checkpoint in floats")
  tensors = {}
  for path, tensor in checkpoint.tensors.items():
    if _EXPERTS.fullmatch(path):
      tensors |= _quantized(path, tensor, FORMATS[kind], report)
    else:
      tensors[path] = tensor
  if len(tensors) == len(checkpoint.tensors):
    raise ValueError("the model has no experts to quantize")
  return dataclasses.replace(checkpoint, tensors=tensors)


def dequantize_experts(checkpoint: Checkpoint,
                       dtype: str = "bfloat16") -> Checkpoint:
  """The same checkpoint with floats in place of quantized leaves.

  Raises:
    ValueError: nothing is quantized.
  """
  leaves = quantized_leaves(checkpoint.tensors)
  if not leaves:
    raise ValueError("the checkpoint has no quantized experts")
  tensors, shapes = dict(checkpoint.tensors), leaf_shapes(checkpoint.config)
  for path, kind in leaves.items():
    parts = {name: tensors.pop(f"{path}/{name}") for name in kind.PARTS}
    tensors[path] = Tensor(
        shapes[path], FLOATS[dtype], lambda kind=kind, parts=parts: kind(
            **{name: part.read() for name, part in parts.items()}
        ).dequantize(FLOATS[dtype]))
  return dataclasses.replace(
      checkpoint, tensors={path: tensors[path] for path in shapes})


def _quantized(path: str, tensor: Tensor, kind, report) -> dict[str, Tensor]:
  """Its parts; the first to be read makes both."""
  try:
    shapes = kind.part_shapes(tensor.shape)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  ready = {}

  def read(part):
    if part not in ready:
      array = tensor.read()
      leaf = kind.quantize(array)
      report(path, quantization_error(array, leaf))
      ready.update({name: getattr(leaf, name) for name in kind.PARTS})
    return ready.pop(part)

  return {f"{path}/{part}": Tensor(shape, dtype, lambda part=part: read(part))
          for (part, dtype), shape in zip(kind.PARTS.items(), shapes,
                                          strict=True)}
