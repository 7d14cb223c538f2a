"""What all quantized leaves share."""
import dataclasses
import math
import typing

import jax
import numpy as np


class Quantized:
  """A stack of matrices [..., in, out], held as quantized [..., out, in].

  It stands in the parameters where an array does: it has `shape`, `dtype` and
  `ndim`, `astype` gives the array, an index takes matrices of the stack, and
  jax sees the arrays it consists of (so jit, sharding and checkpoints work).
  Those are numpy's on the host, which then dequantizes without jax.

  `PARTS` names these arrays with their dtypes, `part_shapes` says their shapes
  for an array of some shape. Each kind says in `quantize` what it writes, such
  that quantizing what was dequantized gives the same bytes again.
  """

  PLANES = 1  # of the tiles

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def nbytes(self) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize
               for x in jax.tree.leaves(self))

  def astype(self, dtype):
    """The array [..., in, out], as the model asks for every weight."""
    return self.dequantize(dtype)

  def __getitem__(self, index):
    """Matrices of the stack: an integer, a slice or an array of integers."""
    if isinstance(index, tuple) or self.ndim < 3:
      raise ValueError(f"{type(self).__name__} {self.shape}[{index}]: only "
                       "the first axis of a stack of matrices can be indexed")
    return jax.tree.map(lambda x: x[index], self)

  def tiles(self):
    """How a stack [E, in, out] is dequantized piece by piece on a CPU.

    Returns:
      A function of (expert, start, size) that gives outputs start ... start +
      size - 1 of one expert as P = `PLANES` arrays, float32 [size, in / P],
      the p-th of inputs p, p + P, p + 2P ... `size` is static.
    """
    raise NotImplementedError

  def __repr__(self):
    return f"{type(self).__name__}{self.shape}"


def leaf(cls):
  """Declares a kind of quantized leaf: a frozen dataclass that jax knows."""
  cls = dataclasses.dataclass(frozen=True, repr=False, eq=False)(cls)
  return jax.tree_util.register_dataclass(
      cls, [field.name for field in dataclasses.fields(cls)], [])


def part_of(stack, start, shape):
  """A part of an array of a stack of matrices, for use in a loop on a CPU.

  XLA widens a stack of narrow floats before it takes a part of it, once for
  all parts, and takes casts to bytes out of loops too: unless these depend on
  what the loop counts.
  """
  if not jax.numpy.issubdtype(stack.dtype, np.floating) or (
      stack.dtype.itemsize >= 4):
    return jax.lax.dynamic_slice(stack, start, shape)
  stack, *start = jax.lax.optimization_barrier((stack, *start))
  bits = jax.lax.bitcast_convert_type(
      stack, np.dtype(f"u{stack.dtype.itemsize}"))
  return jax.lax.bitcast_convert_type(
      jax.lax.dynamic_slice(bits, start, shape), stack.dtype)


def rows_of(stack, expert, start, size: int):
  """Rows of one array of a stack: [E, rows, ...] to [size, ...]."""
  return part_of(stack, (expert, start) + (0,) * (stack.ndim - 2),
                 (1, size, *stack.shape[2:]))[0]


def exponent_of(x):
  """floor(log2(x)) of positive float32, by their bits, for numpy and for jax;
  -127 for what is below 2^-126, and for zero."""
  return (x.view(np.int32) >> 23) - 127


def power_of_two(exponent):
  """Float32 of an int32 from -126 to 127, exact on every device."""
  return (exponent + 127 << 23).view(np.float32)


def is_quantized(x) -> bool:
  return isinstance(x, Quantized)


def map_matrices(function, *stacks):
  """`function` of each matrix of numpy stacks [..., a, b], its results (a
  tuple) stacked: so that what it computes in between stays small."""
  lead = stacks[0].shape[:-2]
  stacks = [x.reshape(-1, *x.shape[len(lead):]) for x in stacks]
  results = None
  for i, row in enumerate(zip(*stacks, strict=True)):
    row = function(*row)
    if results is None:
      results = [np.empty((len(stacks[0]), *x.shape), x.dtype) for x in row]
    for result, x in zip(results, row, strict=True):
      result[i] = x
  return tuple(x.reshape((*lead, *x.shape[1:])) for x in results)


def map_outputs(function, w, step: int) -> tuple[np.ndarray, ...]:
  """`function` of float32 [out, in] for a matrix [in, out], `step` outputs at
  a time (as many as a cache holds), its results (a tuple) put together.

  Raises:
    ValueError: a value is not finite.
  """
  results = []
  for i in range(0, w.shape[1], step):
    rows = np.ascontiguousarray(w[:, i:i + step].T, np.float32)
    if not np.isfinite(rows).all():
      raise ValueError(f"{np.count_nonzero(~np.isfinite(rows))} of {rows.size}"
                       " values are infinite or not a number: they cannot be "
                       "quantized")
    results.append(function(rows))
  return tuple(map(np.concatenate, zip(*results)))


class QuantizationError(typing.NamedTuple):
  """relative_rms: of the differences, against the root mean square of the
  values. largest: of the differences."""
  relative_rms: float
  largest: float


def quantization_error(w, quantized: Quantized) -> QuantizationError:
  """How far a quantized leaf is from what it was made of."""
  if w.shape != quantized.shape:
    raise ValueError(f"the array is {w.shape}, its quantized form "
                     f"{quantized.shape}")
  def sums(w, *arrays):
    w = np.asarray(w, np.float32)
    difference = w - type(quantized)(*arrays).dequantize(np.float32)
    return (np.square(difference, dtype=np.float64).sum(),
            np.square(w, dtype=np.float64).sum(), np.abs(difference).max())
  arrays = [np.asarray(x) for x in jax.tree.leaves(quantized)]
  squares, total, largest = map_matrices(sums, np.asarray(w), *arrays)
  if not total.sum():
    return QuantizationError(0.0, 0.0)
  return QuantizationError(float(np.sqrt(squares.sum() / total.sum())),
                           float(largest.max()))
