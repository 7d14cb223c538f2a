"""FP8 (E4M3) with one scale for each 128 by 128 block (arXiv 2412.19437)."""
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.quant.leaf import (Quantized, exponent_of, leaf,
                                       map_matrices, map_outputs, power_of_two,
                                       rows_of)

BLOCK = 128
# Looking up is four times as fast as ml_dtypes' conversion.
_FLOATS = np.arange(256, dtype=np.uint8).view(
    ml_dtypes.float8_e4m3fn).astype(np.float32)


@leaf
class FP8(Quantized):
  """floats: float8_e4m3fn [..., out, in]. block_scales: float32
  [..., out / 128, in / 128], rounded up (DeepSeek's `weight_scale_inv`), by
  which floats are multiplied. The last blocks may be smaller.
  """
  floats: jax.Array | np.ndarray
  block_scales: jax.Array | np.ndarray

  PARTS = {"floats": np.dtype(ml_dtypes.float8_e4m3fn),
           "block_scales": np.dtype(np.float32)}
  dtype = jnp.dtype(jnp.bfloat16)

  @property
  def shape(self) -> tuple[int, ...]:
    values, scales = self.floats, self.block_scales
    *lead, dim_out, dim_in = values.shape
    if (scales.shape != (*lead, -(-dim_out // BLOCK), -(-dim_in // BLOCK))
        or values.dtype != ml_dtypes.float8_e4m3fn
        or scales.dtype != np.float32):
      raise ValueError(
          f"FP8 floats {values.dtype} {values.shape} and scales "
          f"{scales.dtype} {scales.shape} do not fit: expected float8_e4m3fn "
          f"[..., out, in] and float32, one for each {BLOCK} by {BLOCK} block")
    return (*lead, dim_in, dim_out)

  @staticmethod
  def part_shapes(shape) -> tuple[tuple[int, ...], ...]:
    *lead, dim_in, dim_out = shape
    return ((*lead, dim_out, dim_in),
            (*lead, -(-dim_out // BLOCK), -(-dim_in // BLOCK)))

  def dequantize(self, dtype=jnp.bfloat16):
    """[..., in, out], multiplied in float32."""
    self.shape  # refuses what does not fit
    dtype = jnp.dtype(dtype)
    if isinstance(self.floats, np.ndarray):
      w, = map_matrices(
          lambda v, s: (_dequantize(_FLOATS[v.view(np.uint8)], s, dtype, np),),
          self.floats, self.block_scales)
    else:
      w = _dequantize(self.floats.astype(np.float32), self.block_scales, dtype,
                      jnp)
    return w.swapaxes(-1, -2)

  def tiles(self):
    """As `MXFP4.tiles`: E4M3 is the beginning of a half float times 2^8."""
    dim_in = self.floats.shape[-1]
    step = math.gcd(dim_in, BLOCK)  # of inputs whose scale is the same

    def tile(expert, start, size):
      x = rows_of(self.floats, expert, start, size)
      x = jax.lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint16)
      # After 448 comes not a number, in half floats an exponent of ones.
      half = (x << 8 & 0x8000 | (x & 0x7F) << 7
              | ((x & 0x7F) + 1 >> 7) * jnp.uint16(0x4000))
      half = jax.lax.bitcast_convert_type(half, jnp.float16)
      scales = jnp.repeat(self.block_scales[expert], BLOCK // step, -1)
      scales = scales[(start + jnp.arange(size)) // BLOCK, :dim_in // step]
      large = jnp.abs(scales) >= 2.0 ** (128 - 8)
      first = jnp.where(large, jnp.float32(2 ** 8), 1)
      second = jnp.where(large, scales, scales * 2 ** 8)
      w = half.astype(jnp.float32).reshape(size, -1, step)
      return (w * first[..., None] * second[..., None]).reshape(size, dim_in),
    return tile

  @classmethod
  def quantize(cls, w) -> "FP8":
    """Rounds [..., in, out] to the nearest (ties to even).

    A block's scale is the smallest power of two, from 2^-126, under which its
    largest magnitude rounds to no more than 448. Every result is exact in
    bfloat16, and the largest is then 240 to 448 times the scale (or that is
    2^-126): quantizing again gives the same bytes.
    """
    w = np.asarray(w)
    if w.ndim < 2:
      raise ValueError(f"an array {w.shape} cannot be FP8: expected "
                       "[..., in, out]")
    return cls(*map_matrices(lambda w: map_outputs(_quantize, w, BLOCK), w))


def round_to_fp8(x, rows: int = BLOCK):
  """[..., m, n] in blocks of `rows` by 128, each rounded as `FP8.quantize`
  rounds its, in x's dtype and within jit.

  128 rows give what `FP8.quantize(x)` dequantizes to, one row the tiles that
  activations are scaled by (arXiv 2412.19437, section 3.3.2). Results below
  2^-126 are zero where arithmetic flushes such floats, as XLA's does on a CPU;
  what is not finite stays.
  """
  *lead, m, n = x.shape
  pad = [(0, 0)] * len(lead) + [(0, -m % rows), (0, -n % BLOCK)]
  y = jnp.pad(x.astype(jnp.float32), pad)
  blocks = y.reshape(*lead, y.shape[-2] // rows, rows, -1, BLOCK)
  exponent = _scale_exponents(jnp.abs(blocks).max((-3, -1), keepdims=True))
  v = blocks * power_of_two(-exponent)
  # E4M3 has three bits after the first, and from 2^-6 down even steps. Said in
  # arithmetic, for XLA may drop a cast and its inverse.
  step = (exponent_of(jnp.abs(v)) - 3).clip(-9)
  v = jnp.rint(v * power_of_two(-step)) * power_of_two(step)
  y = (v * power_of_two(exponent)).reshape(y.shape)
  return y[..., :m, :n].astype(x.dtype)


def _spread(scales, shape, xp):
  """Scales of blocks [..., a, b] to those of elements, [..., *shape]."""
  scales = xp.repeat(scales, BLOCK, -2)[..., :shape[0], :]
  return xp.repeat(scales, BLOCK, -1)[..., :shape[1]]


def _dequantize(values, scales, dtype, xp):
  scales = _spread(scales, values.shape[-2:], xp)
  return (values * scales).astype(dtype)


def _quantize(w) -> tuple[np.ndarray, np.ndarray]:
  rows = np.arange(0, w.shape[0], BLOCK)
  columns = np.arange(0, w.shape[1], BLOCK)
  largest = np.maximum.reduceat(np.abs(w), rows, 0)
  largest = np.maximum.reduceat(largest, columns, 1)
  scales = power_of_two(_scale_exponents(largest))
  values = w / _spread(scales, w.shape, np)
  return values.astype(ml_dtypes.float8_e4m3fn), scales


def _scale_exponents(largest):
  """Of the largest magnitudes of blocks."""
  # 464 is half way from 448 to the next step, and rounds to 448. What is above
  # 464 / 512 of a power of two is raised past it.
  raised = (largest.view(np.int32) + 0x17FFFF).view(np.float32)
  # Below 2^-126 a scale is no normal float32. Zeros have that one too, for
  # what is tiny becomes zero.
  return (exponent_of(raised) - 8).clip(-126)
