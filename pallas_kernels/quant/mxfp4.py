"""MXFP4: 4-bit floats in blocks of 32 that share a power of two.

OCP Microscaling Formats 1.0, section 5.3, in the packing of the published
gpt-oss checkpoints.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant.leaf import (Quantized, exponent_of, leaf,
                                       map_matrices, map_outputs, power_of_two,
                                       rows_of)

BLOCK = 32
# E2M1: sign, two bits of exponent, one of mantissa.
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6,
                   -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@leaf
class MXFP4(Quantized):
  """blocks: uint8 [..., out, in / 32, 16], each byte two values along the
  input, the low nibble first. scales: uint8 [..., out, in / 32]; s stands for
  2^(s - 127), 255 for not a number.
  """
  blocks: jax.Array | np.ndarray
  scales: jax.Array | np.ndarray

  PARTS = {"blocks": np.dtype(np.uint8), "scales": np.dtype(np.uint8)}
  PLANES = 2
  dtype = jnp.dtype(jnp.bfloat16)  # holds every value that is not tiny

  @property
  def shape(self) -> tuple[int, ...]:
    blocks, scales = self.blocks, self.scales
    if (blocks.shape != (*scales.shape, BLOCK // 2) or len(scales.shape) < 2
        or {np.dtype(blocks.dtype), np.dtype(scales.dtype)}
        != {np.dtype(np.uint8)}):
      raise ValueError(
          f"MXFP4 blocks {blocks.dtype} {blocks.shape} and scales "
          f"{scales.dtype} {scales.shape} do not fit: expected uint8 "
          "[..., out, in / 32, 16] and [..., out, in / 32]")
    *lead, dim_out, groups = scales.shape
    return (*lead, groups * BLOCK, dim_out)

  @staticmethod
  def part_shapes(shape) -> tuple[tuple[int, ...], ...]:
    if len(shape) < 2 or shape[-2] % BLOCK:
      raise ValueError(
          f"an array {tuple(shape)} cannot be MXFP4: expected [..., in, out] "
          f"with an input dimension that is a multiple of {BLOCK}")
    *lead, dim_in, dim_out = shape
    scales = (*lead, dim_out, dim_in // BLOCK)
    return (*scales, BLOCK // 2), scales

  def dequantize(self, dtype=jnp.bfloat16):
    """[..., in, out], exact in bfloat16 and in float32.

    Where arithmetic flushes tiny floats to zero, as XLA's does on a CPU, so
    do values below 2^-126 and blocks whose scale is 2^-127.
    """
    dtype, (*lead, dim_in, dim_out) = jnp.dtype(dtype), self.shape
    if isinstance(self.blocks, np.ndarray):
      w, = map_matrices(functools.partial(_dequantize, dtype=dtype),
                        self.blocks.reshape(*lead, dim_out, dim_in // 2),
                        self.scales)
    else:
      w = _dequantize_on_device(self.blocks, self.scales).astype(dtype)
      w = w.reshape(*lead, dim_out, dim_in)
    return w.swapaxes(-1, -2)

  def tiles(self):
    """The low nibbles are one plane, the high ones the other.

    Bits of half floats, shifted into place, are values times 2^-14: a CPU
    converts eight or sixteen of them, subnormal ones too, by one instruction.
    """
    def tile(*where):
      blocks = rows_of(self.blocks, *where).astype(jnp.uint16)
      first, second = _scales_up(rows_of(self.scales, *where))

      def plane(sign, magnitude):
        half = blocks << sign & 0x8000 | blocks << magnitude & 0x0E00
        half = jax.lax.bitcast_convert_type(half, jnp.float16)
        w = half.astype(jnp.float32) * first[..., None] * second[..., None]
        return w.reshape(len(w), -1)

      return plane(12, 9), plane(8, 5)
    return tile

  @classmethod
  def quantize(cls, w) -> "MXFP4":
    """Rounds [..., in, out] to the nearest (ties to even).

    A block's scale is 2^(floor(log2(largest)) - 2), within 2^-127 ... 2^125,
    and what is past 6 becomes 6 (section 6.3). So the largest magnitude in a
    block is 4 or 6, unless the scale byte is 0; zero keeps its sign. Such
    blocks are given back byte for byte when they are dequantized (to float32
    or bfloat16) and quantized again. Any other finite block keeps its values
    but not its bytes: they shift to the smallest scale that holds them.
    """
    w = np.asarray(w)
    cls.part_shapes(w.shape)  # refuses what cannot be
    return cls(*map_matrices(lambda w: map_outputs(_quantize, w, 32), w))


def round_to_mxfp4(w):
  """What `MXFP4.quantize(w)` dequantizes to, float32, within jit.

  Where arithmetic flushes tiny floats to zero, as XLA's does on a CPU, it does
  so with those of w and of the result below 2^-126. What is not finite stays.

  Raises:
    ValueError: w [..., in, out] cannot be MXFP4.
  """
  MXFP4.part_shapes(w.shape)
  *lead, dim_in, dim_out = w.shape
  x = w.astype(jnp.float32).reshape(*lead, -1, BLOCK, dim_out)
  y = jnp.abs(x)
  scale = _scale_bytes(y.max(-2, keepdims=True))
  code = _codes(y * power_of_two(127 - scale), jnp)
  # `VALUES`, a quarter of them, so that all factors are normal floats.
  value = jnp.maximum(jnp.maximum(code / 2, code - 2), 2 * code - 8) / 4
  return (jnp.copysign(value, x) * power_of_two(scale - 125)).reshape(w.shape)


@functools.cache
def _pairs(dtype: np.dtype) -> np.ndarray:
  """The two values of each byte under each scale, as one integer [65536]."""
  byte, scale = np.arange(256), np.arange(256)[:, None, None]
  nibbles = np.stack([byte & 15, byte >> 4], -1)
  with np.errstate(over="ignore"):
    values = np.ldexp(VALUES[nibbles], scale - 127)
    values[255] = np.nan
    values = values.astype(dtype)
  return values.view(f"u{2 * dtype.itemsize}").reshape(-1)


def _dequantize(blocks, scales, *, dtype: np.dtype) -> tuple[np.ndarray]:
  """[out, in / 2] and [out, in / 32] to [out, in], by looking up."""
  index = scales.astype(np.uint16)[..., None] << 8
  index = index | blocks.reshape(*scales.shape, -1)
  return _pairs(dtype)[index].view(dtype).reshape(len(scales), -1),


def _dequantize_on_device(blocks, scales):
  """[..., in / 32, 16] and [..., in / 32] to float32 [..., in / 32, 16, 2].

  Arithmetic throughout: accelerators are slow at looking up.
  """
  def as_float(bits):
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)

  nibble = (blocks[..., None] >> jnp.array([0, 4], jnp.uint8)).astype(
      jnp.uint32)
  magnitude = nibble & 7
  # 252 << 22 is 0.5 and each step one more half of an exponent, after 1.
  bits = jnp.where(magnitude == 0, 0,
                   (magnitude + 252 - (magnitude == 1)) << 22)
  scale = scales.astype(jnp.uint32)
  scale = as_float(jnp.where(scale == 0, 1 << 22, scale << 23))
  scale = jnp.where(scales == 255, jnp.nan, scale)
  return as_float(bits | (nibble & 8) << 28) * scale[..., None, None]


def _scales_up(scales):
  """Two float32 factors whose product is each scale times 2^14: one of them
  is 1 unless both have to share what is past float32."""
  scales = scales.astype(jnp.uint32)
  large = scales > 254 - 14
  first = jnp.where(large, jnp.float32(2 ** 14), 1)
  first = jnp.where(scales == 255, jnp.nan, first)
  second = jnp.where(large, scales, scales + 14) << 23
  return first, jax.lax.bitcast_convert_type(second, jnp.float32)


def _quantize(w) -> tuple[np.ndarray, np.ndarray]:
  """[out, in] to blocks [out, in / 32, 16] and scales [out, in / 32]."""
  w = w.reshape(len(w), -1, BLOCK)
  y = np.abs(w)
  scale = _scale_bytes(y.max(-1))
  y *= power_of_two(127 - scale)[..., None]
  code = _codes(y, np).astype(np.uint8) | np.signbit(w) * np.uint8(8)
  return code[..., ::2] | code[..., 1::2] << 4, scale.astype(np.uint8)


def _scale_bytes(largest):
  """int32, of the largest magnitudes of blocks."""
  least = -127
  return (exponent_of(largest) - 2).clip(least) - least


def _codes(y, xp):
  """Of magnitudes over their scale, as floats."""
  # The steps between codes are 0.5 below 2, 1 below 4, then 2.
  code = xp.rint(2 * y)
  code = xp.minimum(code, xp.rint(y) + 2)
  code = xp.minimum(code, xp.rint(y / 2) + 4)
  return xp.minimum(code, 7)
