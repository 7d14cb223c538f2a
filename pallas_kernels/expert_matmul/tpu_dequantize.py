"""Weights of every format as tiles that a TPU's matrix unit takes.

A kernel that multiplies by an expert's tile of outputs asks an `Operand` for
it: the arrays and blocks to fetch, and how to fill a cache in VMEM with the
tile dequantized, a part of its depth (the contracted axis) at a time.

MXFP4, 1024 weights (one register) at a time, in vector operations:

  5 / 8  and, shift, shift, xor, and: a register of words gives two of E5M2
  1      E5M2 to float32                  (7x: 1 / 2, to bfloat16)
  1      times the scale in float32, and  (v6e, 7x: 1 / 2, in bfloat16
  1 / 2  rounding to bfloat16              after rounding)

Of four a cycle that is 0.78 (v5e, v5p), 0.66 (v6e), 0.41 cycles (7x), of the
1.00, 0.69, 0.58, 0.32 in which memory delivers as many packed ones.
"""
import dataclasses
import functools
import typing

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quant import FP8, Int8, MXFP4Pairs
from pallas_kernels.quant.fp8 import BLOCK as FP8_BLOCK
from pallas_kernels.quant.mxfp4 import BLOCK
from pallas_kernels.quant.mxfp4_pairs import MASK

PAIR = 2 * BLOCK
# What E5M2 lacks: its magnitudes are the values times 2^-14.
EXPONENT = 14


@dataclasses.dataclass(frozen=True)
class Operand:
  """What a kernel needs to know of its weights.

  arrays, blocks: what is fetched for a tile of outputs; a block is its shape
    and which of its axes are (expert, the tile of outputs).
  outputs_first: tiles are [outputs, depth], else [depth, outputs].
  cache: shape of the dequantized tile; None: the only block is the tile.
  words: whether the cache holds bfloat16 as int32, two rows in one.
  scratch: shapes and dtypes of memory `prepare` fills for `fill`.
  prepare(refs, scratch): once a tile.
  fill(refs, scratch, cache, start, end, tile[, at]): that depth of the tile,
    into the cache from row `at` on (of MXFP4; of others it is `start`).
  prepare_exact, fill_exact: likewise, for scales that these are wrong for.
  input_scales_EK, output_scales_EN: by which the other operand and the
    result are multiplied.
  """
  arrays: tuple
  blocks: tuple
  outputs_first: bool
  cache: tuple[int, int] | None = None
  words: bool = False
  scratch: tuple = ()
  prepare: typing.Callable | None = None
  fill: typing.Callable | None = None
  prepare_exact: typing.Callable | None = None
  fill_exact: typing.Callable | None = None
  input_scales_EK: typing.Any = None
  output_scales_EN: typing.Any = None


def operand(weights, columns: int, dtype, *, transposed: bool, packed: bool,
            interpreted: bool) -> Operand:
  """Weights [E, D, F], or [E, F, D] if transposed, in tiles of `columns`.

  packed: the vector unit multiplies bfloat16.
  """
  if isinstance(weights, MXFP4Pairs):
    return _pairs(weights, columns, dtype, transposed, packed, interpreted)
  if isinstance(weights, Int8):
    scales = weights.channel_scales
    return dataclasses.replace(
        _bytes(weights.integers, columns, transposed, _fill_int8),
        **{"input_scales_EK" if transposed else "output_scales_EN": scales})
  if isinstance(weights, FP8):
    return _fp8(weights, columns, transposed)
  _, dim_in, dim_out = weights.shape
  if transposed:
    return Operand((weights,), (((1, columns, dim_out), 1),), True)
  return Operand((weights,), (((1, dim_in, columns), 2),), False)


def _bytes(values, columns: int, transposed: bool, fill, *more) -> Operand:
  """Values [E, F, D] as published; `more` arrays an expert, whole."""
  _, dim_out, dim_in = values.shape
  tile = (dim_out, columns) if transposed else (columns, dim_in)
  blocks = (((1, *tile), 2 if transposed else 1),
            *(((1, *x.shape[1:]), None) for x in more))
  return Operand((values, *more), blocks, not transposed, tile,
                 fill=functools.partial(fill, transposed=transposed))


def _fill_int8(refs, scratch, cache, start, end, tile, *, transposed):
  values, = refs
  if transposed:
    cache[start:end, :] = values[0, start:end, :].astype(
        jnp.float32).astype(cache.dtype)
  else:
    cache[:, start:end] = values[0, :, start:end].astype(
        jnp.float32).astype(cache.dtype)


def _fp8(weights: FP8, columns: int, transposed: bool) -> Operand:
  return _bytes(weights.floats, columns, transposed, _fill_fp8,
                weights.block_scales)


def _fill_fp8(refs, scratch, cache, start, end, tile, *, transposed):
  """A block of 128 by 128 at a time, each times its one scale."""
  values, scales = refs
  tile_axis = 1 if transposed else 0
  columns = cache.shape[tile_axis]
  last = scales.shape[2 if transposed else 1] - 1
  for a in range(start, end, FP8_BLOCK):
    depth = slice(a, min(a + FP8_BLOCK, end))
    for b in range(0, columns, FP8_BLOCK):
      width = slice(b, min(b + FP8_BLOCK, columns))
      # A tile may reach past the last block: what is there is not used.
      block = jnp.minimum(tile * (columns // FP8_BLOCK) + b // FP8_BLOCK, last)
      if transposed:
        index, row, lane = (depth, width), a // FP8_BLOCK, block
      else:
        index, row, lane = (width, depth), block, a // FP8_BLOCK
      scale = scales[0, pl.ds(row, 1), :]
      chosen = lax.broadcasted_iota(jnp.int32, scale.shape, 1) == lane
      scale = jnp.sum(jnp.where(chosen, scale, 0), 1, keepdims=True)
      w = values[(0, *index)].astype(jnp.float32) * scale
      cache[index] = w.astype(cache.dtype)


def _pairs(weights: MXFP4Pairs, columns: int, dtype, transposed: bool,
           packed: bool, interpreted: bool) -> Operand:
  lanes = weights.pairs.shape[-1]
  depth = weights.pairs.shape[-2] * 8
  groups = weights.pair_scales.shape[-2]
  packed = packed and dtype == jnp.bfloat16
  if transposed:
    rows, width, axis = columns, lanes, 1
    groups = min(-(-columns // 1024) * 32, groups)  # whole tiles of bytes
  else:
    rows, width, axis = depth, columns, 2
  blocks = (((1, rows // 8, width), axis), ((1, groups, width), axis))
  return Operand(
      (weights.pairs, weights.pair_scales), blocks, transposed, (rows, width),
      dtype == jnp.bfloat16, (((groups, width), jnp.int32),),
      functools.partial(_prepare_pairs, packed=packed),
      functools.partial(_fill_pairs, transposed=transposed, packed=packed,
                        interpreted=interpreted),
      _prepare_pairs_exactly,
      functools.partial(_fill_pairs_exactly, transposed=transposed))


def _float(bits):
  return lax.bitcast_convert_type(bits, jnp.float32)


def _prepare_pairs(refs, scratch, *, packed: bool):
  """Scales times 2^14: bits of a float32, or of two equal bfloat16s."""
  exponent = refs[1][0].astype(jnp.int32) + EXPONENT
  scratch[0][...] = exponent * 0x00800080 if packed else exponent << 23


def _values(words):
  """E5M2 [32, N] of both blocks of a pair, from their words [8, N]."""
  mask = np.uint32(MASK)
  second = (words << np.uint32(7) ^ words >> np.uint32(3)) & mask
  return tuple(pltpu.bitcast(x, jnp.float8_e5m2)
               for x in (words & mask, second))


def _put(cache, row, w):
  """Rows of float32 or bfloat16 into the cache, from a multiple of 16 on.

  Words, since a register of bfloat16 loads and stores as one only so: as
  bfloat16 16 rows by 128 are two tiles of 8 in memory, which v5 takes one more
  load and an "or" to join: 1/2 an operation for 1024 weights.
  """
  if cache.dtype == jnp.int32:
    w = pltpu.bitcast(w.astype(jnp.bfloat16), jnp.int32)
    row = row // 2 if isinstance(row, int) else pl.multiple_of(row // 2, 8)
  cache[pl.ds(row, w.shape[0]), :] = w.astype(cache.dtype)


def _eight_times(ref, row: int, interpreted: bool):
  """A row, eight times: one load, but the interpreter knows no stride 0."""
  if interpreted:
    return jnp.broadcast_to(ref[row:row + 1, :], (8, ref.shape[1]))
  return ref[pl.ds(row, 8, stride=0), :]


def _fill_pairs(refs, scratch, cache, start, end, tile, at=None, *, transposed,
                packed, interpreted):
  if transposed:  # every pair has all of the depth
    start, end = 0, refs[0].shape[1] * 8
  shift = 0 if at is None else at - start
  scales = scratch[0]
  for pair in range(start // PAIR, -(-end // PAIR)):
    for i, values in enumerate(_values(refs[0][0, 8 * pair:8 * pair + 8, :])):
      block, row = 2 * pair + i, PAIR * pair + BLOCK * i + shift
      scale = _eight_times(scales, block, interpreted)
      if packed:
        scale = pltpu.bitcast(scale, jnp.bfloat16)
        values = values.astype(jnp.bfloat16)
        for half in range(0, BLOCK, 16):
          _put(cache, row + half, values[half:half + 16] * scale)
      else:
        values, scale = values.astype(jnp.float32), _float(scale)
        for half in range(0, BLOCK, 16):
          _put(cache, row + half, jnp.concatenate([
              values[a:a + 8] * scale for a in (half, half + 8)], 0))


def _prepare_pairs_exactly(refs, scratch):
  scratch[0][...] = refs[1][0].astype(jnp.int32)


def _fill_pairs_exactly(refs, scratch, cache, start, end, tile, at=None, *,
                        transposed):
  """Any scale: above 2^0 values get their 2^14 first, below the scale does."""
  if transposed:
    start, end = 0, refs[0].shape[1] * 8
  shift = 0 if at is None else at - start

  def pair(p, _):
    for i, values in enumerate(_values(refs[0][0, pl.ds(8 * p, 8), :])):
      scale = scratch[0][pl.ds(2 * p + i, 1), :]
      above = scale > 127
      first = jnp.where(above, 2.0 ** EXPONENT, 1.0)
      then = _float(jnp.where(above, scale, scale + EXPONENT) << 23)
      then = jnp.where(scale == 255, jnp.nan, then)
      w = values.astype(jnp.float32) * first * then
      _put(cache, pl.multiple_of(PAIR * p + BLOCK * i + shift, BLOCK), w)
    return 0

  lax.fori_loop(start // PAIR, -(-end // PAIR), pair, 0)
