"""MXFP4 laid out for matrix units: outputs along lanes, blocks in pairs.

The published packing puts neighbours along the input into one byte, so that
to unpack it is to interleave rows, which costs a TPU some 17 cycles for 1024
weights. Here a 32-bit word holds four rows of one block and the same four of
the next, such that two 8-bit floats (E5M2) a byte come out of

    first = word & MASK,   second = (word << 7 ^ word >> 3) & MASK

whose sign is in bit 7 and whose magnitude, 3 bits, in bits 3..1: as E5M2 that
stands for its value times 2^-14. What the two shifts bring along from other
bits is compensated when words are made, which is cheaper than masking it
away in the kernel. 8 rows of words by 128 lanes, one tile of a TPU's memory,
are two whole blocks of 128 outputs. Every bit of the published form is kept.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant.leaf import Quantized, map_matrices
from pallas_kernels.quant.mxfp4 import BLOCK, MXFP4

LANES = 128
_SCALE_ROWS = 32  # a tile of bytes has 32 rows
MASK = 0x8E8E8E8E
# A larger scale times the 2^14 that E5M2 lacks is past float32.
LARGEST_PLAIN = 240


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["pairs", "pair_scales", "large_scales"],
                   meta_fields=["matrix", "deinterleaved"])
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class MXFP4Pairs(Quantized):
  """A stack of matrices [..., D, F].

  pairs: uint32 [..., 8 P, L], P pairs of blocks along the input; byte j of
    word row 8 p + i is row 4 i + j of the blocks 2 p and 2 p + 1.
  pair_scales: uint8 [..., S, L], a row for each block, then rows of zeros up
    to a multiple of 32.
  large_scales: int32 [...], 1 for a matrix with a scale above 240 (so that
    kernels need to look for those, and for 255, in such a matrix alone).
  matrix: (D, F). L is F rounded up to a multiple of 128, the rest zeros.
  deinterleaved: outputs lie as 128 even ones (gate), 128 odd ones (up), 128
    even ones ...; each half of F is then rounded up to a multiple of 128.

  The leading axes may be split over devices, the last two may not.
  """
  pairs: jax.Array | np.ndarray
  pair_scales: jax.Array | np.ndarray
  large_scales: jax.Array | np.ndarray
  matrix: tuple[int, int]
  deinterleaved: bool

  dtype = MXFP4.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    (dim_in, dim_out), lead = self.matrix, self.large_scales.shape
    blocks = _round_up(dim_in // BLOCK, 2)
    lanes = _lanes(dim_out, self.deinterleaved)
    expected = ((*lead, blocks * BLOCK // 8, lanes),
                (*lead, _round_up(blocks, _SCALE_ROWS), lanes))
    if (self.pairs.shape, self.pair_scales.shape) != expected:
      raise ValueError(
          f"MXFP4 pairs {self.pairs.shape} and scales "
          f"{self.pair_scales.shape} of matrices {self.matrix}: expected "
          f"{expected[0]} and {expected[1]}")
    return (*lead, dim_in, dim_out)

  @classmethod
  def from_mxfp4(cls, weights: MXFP4, *, deinterleave=False) -> "MXFP4Pairs":
    """The same weights; numpy's stay on the host.

    Raises:
      ValueError: `deinterleave` and an odd number of outputs.
    """
    *lead, dim_in, dim_out = weights.shape
    _lanes(dim_out, deinterleave)  # refuses what cannot be
    blocks = weights.blocks.reshape(*lead, dim_out, dim_in // 2)
    if isinstance(blocks, np.ndarray):
      pairs, scales, large = map_matrices(
          functools.partial(_pack, deinterleave=deinterleave, xp=np), blocks,
          weights.scales)
    else:
      pairs, scales, large = _pack(blocks, weights.scales, deinterleave, jnp)
    return cls(pairs, scales, large.reshape(lead), (dim_in, dim_out),
               deinterleave)

  def to_mxfp4(self) -> MXFP4:
    """As published, the same bytes."""
    *lead, dim_in, dim_out = self.shape
    kwargs = dict(matrix=self.matrix, interleave=self.deinterleaved)
    if isinstance(self.pairs, np.ndarray):
      blocks, scales = map_matrices(
          functools.partial(_unpack, xp=np, **kwargs), self.pairs,
          self.pair_scales)
    else:
      blocks, scales = _unpack(self.pairs, self.pair_scales, xp=jnp, **kwargs)
    return MXFP4(blocks.reshape(*scales.shape, BLOCK // 2), scales)

  @classmethod
  def quantize(cls, w, *, deinterleave=False) -> "MXFP4Pairs":
    """As `MXFP4.quantize` rounds [..., in, out]."""
    return cls.from_mxfp4(MXFP4.quantize(w), deinterleave=deinterleave)

  def dequantize(self, dtype=jnp.bfloat16):
    """[..., in, out], outputs in the published order."""
    return self.to_mxfp4().dequantize(dtype)

  def to_lanes(self, x):
    """[..., F] in the published order to [..., L] in this leaf's order."""
    return _to_lanes(x, self.deinterleaved, jnp)

  def from_lanes(self, x):
    """[..., L] in this leaf's order to [..., F] in the published one."""
    return _from_lanes(x, self.matrix[1], self.deinterleaved)


def _round_up(x: int, multiple: int) -> int:
  return -(-x // multiple) * multiple


def _lanes(dim_out: int, deinterleaved: bool) -> int:
  if not deinterleaved:
    return _round_up(dim_out, LANES)
  if dim_out % 2:
    raise ValueError(f"{dim_out} outputs cannot be de-interleaved: expected "
                     "pairs of gate and up")
  return 2 * _round_up(dim_out // 2, LANES)


def _pad(x, axis: int, size: int, xp):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return xp.pad(x, widths)


def _to_lanes(x, deinterleave: bool, xp):
  *lead, dim = x.shape
  lanes = _lanes(dim, deinterleave)
  if not deinterleave:
    return _pad(x, -1, lanes, xp)
  x = _pad(x.reshape(*lead, dim // 2, 2), -2, lanes // 2, xp)
  return x.reshape(*lead, -1, LANES, 2).swapaxes(-1, -2).reshape(*lead, lanes)


def _from_lanes(x, dim: int, interleave: bool):
  if not interleave:
    return x[..., :dim]
  *lead, lanes = x.shape
  x = x.reshape(*lead, -1, 2, LANES).swapaxes(-1, -2)
  return x.reshape(*lead, lanes)[..., :dim]


def _pack(bytes_, scales, deinterleave: bool, xp):
  """[..., out, in / 2] and [..., out, in / 32] to the arrays of a leaf."""
  *lead, dim_out, blocks = scales.shape
  even = _round_up(blocks, 2)
  # [..., out, pair, block of the pair, 16 bytes], then inputs before outputs.
  x = _pad(bytes_.reshape(*lead, dim_out, blocks, BLOCK // 2), -2, even, xp)
  x = xp.moveaxis(x.reshape(*lead, dim_out, even // 2, 2, -1), -4, -1)
  x = _to_lanes(x, deinterleave, xp)
  x = xp.stack([x & 15, x >> 4], -2)  # [..., 16 bytes, 2 nibbles, lanes]
  x = x.reshape(*lead, even // 2, 2, BLOCK, -1)
  rows = _to_lanes(scales.swapaxes(-1, -2), deinterleave, xp)
  rows = _pad(rows, -2, _round_up(even, _SCALE_ROWS), xp)
  large = xp.any(scales > LARGEST_PLAIN, (-1, -2))
  return (_words(x[..., 0, :, :], x[..., 1, :, :], xp), rows,
          large.astype(np.int32)[..., None, None])


def _words(first, second, xp):
  """Nibbles [..., P, 32, L] of each pair's blocks to words [..., 8 P, L]."""
  def floats(x):
    x = x.reshape(*x.shape[:-2], BLOCK // 4, 4, x.shape[-1])
    x = ((x & 8) << 4 | (x & 7) << 1).astype(np.uint32)
    return x[..., 0, :] | x[..., 1, :] << 8 | x[..., 2, :] << 16 | (
        x[..., 3, :] << 24)

  first, second = floats(first), floats(second)
  # Four bits of each byte are free, 6..4 and 0: the shifts take 0 to 7 and
  # 6..4 to 3..1, and 4 also to 3 of the next byte.
  second ^= _second(first)
  free = (second >> 7 & 0x01010101 | second << 3 & 0x70707070
          ) ^ second << 13 & 0x40404040
  return (first | free).reshape(*free.shape[:-3], -1, free.shape[-1])


def _second(words):
  return (words << 7 ^ words >> 3) & np.uint32(MASK)


def _unpack(pairs, scales, *, matrix, interleave: bool, xp):
  """The arrays of a leaf to [..., out, in / 2] and [..., out, in / 32]."""
  lead, (dim_in, dim_out) = pairs.shape[:-2], matrix
  x = xp.stack([pairs & np.uint32(MASK), _second(pairs)], -2)
  x = x.reshape(*lead, -1, BLOCK // 4, 2, pairs.shape[-1])
  x = xp.moveaxis(x, -2, -3)[..., None, :] >> np.arange(
      0, 32, 8, dtype=np.uint32)[:, None]
  x = (x >> 4 & 8 | x >> 1 & 7).astype(np.uint8)
  x = x.reshape(*lead, -1, 2, x.shape[-1])  # [..., bytes, 2 nibbles, lanes]
  x = x[..., 0, :] | x[..., 1, :] << 4
  x = _from_lanes(x[..., :dim_in // 2, :], dim_out, interleave)
  rows = _from_lanes(scales[..., :dim_in // BLOCK, :], dim_out, interleave)
  return x.swapaxes(-1, -2), rows.swapaxes(-1, -2)
