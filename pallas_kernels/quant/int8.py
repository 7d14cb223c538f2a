"""8-bit integers with one scale for each output channel."""
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant.leaf import (Quantized, leaf, map_matrices,
                                       map_outputs, rows_of)

LARGEST = 127


@leaf
class Int8(Quantized):
  """integers: int8 [..., out, in], from -127 to 127. channel_scales: float32
  [..., out].
  """
  integers: jax.Array | np.ndarray
  channel_scales: jax.Array | np.ndarray

  PARTS = {"integers": np.dtype(np.int8),
           "channel_scales": np.dtype(np.float32)}
  dtype = jnp.dtype(jnp.float32)

  @property
  def shape(self) -> tuple[int, ...]:
    values, scales = self.integers, self.channel_scales
    if (values.shape[:-1] != scales.shape or len(scales.shape) < 1
        or values.dtype != np.int8 or scales.dtype != np.float32):
      raise ValueError(
          f"int8 integers {values.dtype} {values.shape} and scales "
          f"{scales.dtype} {scales.shape} do not fit: expected int8 "
          "[..., out, in] and float32 [..., out]")
    *lead, dim_out, dim_in = values.shape
    return (*lead, dim_in, dim_out)

  @staticmethod
  def part_shapes(shape) -> tuple[tuple[int, ...], ...]:
    *lead, dim_in, dim_out = shape
    return (*lead, dim_out, dim_in), (*lead, dim_out)

  def dequantize(self, dtype=jnp.float32):
    """[..., in, out], exact in float32 if `quantize` wrote it."""
    self.shape  # refuses what does not fit
    dtype = jnp.dtype(dtype)
    if isinstance(self.integers, np.ndarray):
      w, = map_matrices(lambda v, s: (_dequantize(v, s[:, 0], dtype),),
                        self.integers, self.channel_scales[..., None])
    else:
      w = _dequantize(self.integers, self.channel_scales, dtype)
    return w.swapaxes(-1, -2)

  def tiles(self):
    def tile(*where):
      return _dequantize(rows_of(self.integers, *where),
                         rows_of(self.channel_scales, *where), np.float32),
    return tile

  @classmethod
  def quantize(cls, w) -> "Int8":
    """Rounds [..., in, out] to the nearest (ties to even).

    A scale is the largest magnitude of its channel / 127, rounded up to 16
    significant bits and at least 2^-126: scale times value is then exact in
    float32, so that quantizing again gives the same bytes.
    """
    w = np.asarray(w)
    if w.ndim < 2:
      raise ValueError(f"an array {w.shape} cannot be int8: expected "
                       "[..., in, out]")
    values, scales = map_matrices(
        lambda w: map_outputs(_quantize, w, 32), w)
    return cls(values, scales[..., 0])


def _dequantize(values, scales, dtype):
  return (values.astype(np.float32) * scales[..., None]).astype(dtype)


def _quantize(w) -> tuple[np.ndarray, np.ndarray]:
  fraction, exponent = np.frexp(np.abs(w).max(-1, keepdims=True)
                                .astype(np.float64) / LARGEST)
  scales = np.ldexp(np.ceil(np.ldexp(fraction, 16)), exponent - 16)
  scales = np.maximum(scales, 2.0 ** -126)
  values = np.rint(w / scales).astype(np.int8)
  return values, scales.astype(np.float32)
