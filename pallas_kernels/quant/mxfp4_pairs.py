"""MXFP4 laid out for matrix units: outputs along lanes, blocks in pairs.

The published packing puts neighbours along the input into one byte, so that
to unpack it is to interleave rows, which costs a TPU some 17 cycles for 1024
weights. Here a byte holds the same row of two neighbouring blocks, in bits
that are those of two 8-bit floats (E5M2) but for one shift:

    bit     7      6 5 4        3 2 1        0
    value   first  second       first        second
            sign   magnitude    magnitude    sign

A magnitude in bits 3..1 of an E5M2 float stands for its value times 2^-14.
32 rows of bytes by 128 lanes, one tile of a TPU's memory, are two whole
blocks of 128 outputs. Every bit of the published form is kept.
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
# Scales from here to 254 times 2^14 are past float32: see `large_scales`.
LARGE = 241


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["pairs", "pair_scales", "large_scales"],
                   meta_fields=["matrix", "deinterleaved"])
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class MXFP4Pairs(Quantized):
  """A stack of matrices [..., D, F].

  pairs: uint8 [..., 32 P, L], P pairs of blocks along the input.
  pair_scales: uint8 [..., S, L], a row for each block, then rows of zeros up
    to a multiple of 32.
  large_scales: int32 [...], 1 for a matrix in which a scale is 241 to 254.
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
    expected = ((*lead, blocks * BLOCK // 2, lanes),
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
  first, second = x[..., 0, :, :], x[..., 1, :, :]
  pairs = (first & 8) << 4 | (first & 7) << 1 | (second & 7) << 4 | second >> 3
  rows = _to_lanes(scales.swapaxes(-1, -2), deinterleave, xp)
  large = xp.any((scales >= LARGE) & (scales < 255), (-1, -2))
  return (pairs.reshape(*lead, even * BLOCK // 2, -1),
          _pad(rows, -2, _round_up(even, _SCALE_ROWS), xp),
          large.astype(np.int32)[..., None, None])


def _unpack(pairs, scales, *, matrix, interleave: bool, xp):
  """The arrays of a leaf to [..., out, in / 2] and [..., out, in / 32]."""
  lead, (dim_in, dim_out) = pairs.shape[:-2], matrix
  x = pairs.reshape(*lead, -1, BLOCK, pairs.shape[-1])
  x = xp.stack([x >> 4 & 8 | x >> 1 & 7, (x & 1) << 3 | x >> 4 & 7], -3)
  x = x.reshape(*lead, -1, 2, x.shape[-1])  # [..., bytes, 2 nibbles, lanes]
  x = x[..., 0, :] | x[..., 1, :] << 4
  x = _from_lanes(x[..., :dim_in // 2, :], dim_out, interleave)
  rows = _from_lanes(scales[..., :dim_in // BLOCK, :], dim_out, interleave)
  return x.swapaxes(-1, -2), rows.swapaxes(-1, -2)
