"""The TPU backward for a narrow window: the whole band of a block in a step.

Blocks of queries, with all G query heads of a key head, are walked from the
last to the first. A step reads a block of queries, its keys and those just
before it. Of its keys only those before the block get more to come, and what
they have is kept in VMEM for the next step. So each pair of a query and a key
is computed once, each array is read and written once, and nothing needs an
atomic, a partial sum in HBM or a second visit.

gpt-oss (H 64, G 8, W 128): a step of 1024 queries reads and writes
8 * 64 * 1024 * 2 B of q, do and dq each, 64 * 1024 * 2 B of k, v, dk and dv
each, and lse and delta, 3.7 MB, for 1 M scores of 5 matmuls. A systolic array
is poorly used by them: S and dP are 64 deep where it is 128 (v5) or 256 deep,
and a block of 128 queries sees 255 keys though each of its queries sees 128.
Both are turned to use:

- Half of the depth masks. Beside K^T stand columns with one large negative
  number, below Q rows of 0 and 1, whose product is UNSEEN at every key that a
  query must not see and 0 elsewhere (_mask_factors). No vector operation is
  spent on masks, at any window.
- A tile of 128 lanes holds `sub` queries of each of 128 / sub heads (_swap),
  which see sub + 127 keys. With sub 32 that is 1.25 times what is needed, not
  2 times, in S, dP, exponentials and all else that is elementwise; the other
  three matmuls contract 256 keys or queries at a time as before. On a 128
  wide array (v5e), S and dP cost 2 * 2.5 cycles per 1024 scores and dQ, dK, dV
  3 * 2, 11 in all against 14; HBM delivers their bytes in 6.7.

The keys of a part of a column begin at a lane that is no multiple of 128. The
keys that dQ contracts are kept shifted by as much (k_windows), and dK and dV
are summed per part, so shifted, and put together at the end (finish).
"""
import collections
import functools

from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import numpy as np

from pallas_kernels import platforms, vma
from pallas_kernels.windowed_attention import tpu_blocks
from pallas_kernels.windowed_attention.tpu_backward_scores import (
    LANES, UNSEEN, Item, Names, Plan, Step, kept, segments_down, turn, values,
    words)
from pallas_kernels.windowed_attention.tpu_common import cost


def oldest(plan: Plan) -> int:
  """The first key of an item, from its first query: whole rows of words."""
  return (1 - plan.window) // 16 * 16


def _swap(tiles):
  """Of m arrays of words [rows, 128], of m blocks of lanes, block j of array i
  becomes block i of array j: of a head each, or of a part of each head."""
  m = len(tiles)
  width = LANES // m
  lane = lax.broadcasted_iota(jnp.int32, tiles[0].shape, 1)
  step = 1
  while step < m:
    high = (lane & (step * width)) != 0
    for i in range(m):
      if not i & step:
        a, b = tiles[i], tiles[i + step]
        tiles[i] = jnp.where(high, pltpu.roll(b, step * width, 1), a)
        tiles[i + step] = jnp.where(
            high, b, pltpu.roll(a, LANES - step * width, 1))
    step *= 2
  return tiles


def _mask_factors(plan):
  """Left [keys, 2 sub] and right [2 sub, lanes], whose product is UNSEEN where
  a query must not see a key and 0 elsewhere, with one product at most in a
  sum, for the keys from the oldest that the first query of a part sees."""
  sub, window = plan.sub, plan.window
  query = np.arange(plan.lanes) % sub
  key = np.arange(oldest(plan), sub)
  left = np.zeros((len(key), 2 * sub), np.float32)
  index = np.arange(sub)[:, None]
  right = np.concatenate([query < index, query >= index]).astype(np.float32)
  ahead = key >= 1  # not seen by queries before the key
  left[ahead, key[ahead]] = UNSEEN
  behind = np.maximum(key + window, 0)  # not seen by queries from there on
  old = behind < sub
  left[old, sub + behind[old]] = UNSEEN
  return left, right


def _lanes_from(tile, start, end):
  """128 lanes from `start` on of what tile(i) gives 128 at a time; those from
  `end` on do not matter."""
  first, shift = divmod(start, LANES)
  if not shift:
    return tile(first)
  a = pltpu.roll(tile(first), LANES - shift, 1)
  if (first + 1) * LANES >= end:
    return a
  b = pltpu.roll(tile(first + 1), LANES - shift, 1)
  lane = lax.broadcasted_iota(jnp.int32, a.shape, 1)
  return jnp.where(lane < LANES - shift, a, b)


def _kernel(*refs, plan, has_segments, interpreted):
  names = Names(refs)
  q, do, lse, delta, k, v, k_before, v_before = names.take(8)
  mask_left, mask_right = names.take(2, plan.mask_by_matmul)
  segments, segments_k, segments_before = names.take(3, has_segments)
  dq, dk, dv, kt, vt, k_tiles, k_windows, dk_sum, dv_sum = names.take(9)
  packed_q, packed_do, packed_dq = names.take(3, plan.packed > 1)
  key_segments = names.one(has_segments)
  halo, dtype = plan.before, k.dtype
  tiles_before, columns = halo // LANES, plan.rows // LANES

  def first_key(part):
    """Of a part of the first column, from the start of the halo."""
    first = halo + part * plan.sub + oldest(plan)
    return first // LANES * LANES if plan.whole_tiles else first

  def num_keys(part):
    last = halo + part * plan.sub + plan.sub
    return (-(-last // LANES) * LANES if plan.whole_tiles else last) - (
        first_key(part))

  if has_segments:
    segments_down(key_segments, segments_before[...])
    segments_down(key_segments, segments_k[...], halo)
  for x in dk_sum, dv_sum:
    # What the step before, of later queries, has found for our last keys.
    later = jnp.where(pl.program_id(2) == 0, 0.0, x[:, :, :halo])
    x[:, :, :plan.rows] = jnp.zeros_like(x[:, :, :plan.rows])
    x[:, :, plan.rows:] = later

  def load_keys(tile):
    for x, x_before, turned in (k, k_before, kt), (v, v_before, vt):
      x = (x_before[:, pl.ds(tile * LANES, LANES)] if tile < tiles_before
           else x[:, pl.ds((tile - tiles_before) * LANES, LANES)])
      if turned is kt:
        k_tiles[tile] = words(x)
      x = turn(x, turned.shape[1])
      turned[pl.ds(tile * x.shape[0], x.shape[0])] = x

  def load(x, head, at, first=0, count=None):
    """Words of queries of a head."""
    if interpreted:  # the interpreter has no references to words
      found = words(x[0, 0, head, :, at])
      return found if count is None else found[first:first + count]
    rows = slice(None) if count is None else pl.ds(first, count)
    return words(x)[0, 0, head, rows, at]

  def pack(x, packed, column, first):
    at = pl.ds(column * LANES, LANES)
    heads = range(first, first + plan.packed)
    if plan.array == 128:
      # These chips have no instruction that joins halves of two registers.
      to = packed.at[column, first // plan.packed]
      for n, head in enumerate(heads):
        for row in range(0, to.shape[1], 4):
          to[n, pl.ds(row, 4)] = load(x, head, at, row, 4)
      tiles = _swap([to[n] for n in range(plan.packed)])
    else:
      tiles = _swap([load(x, head, at) for head in heads])
    for part, tile in enumerate(tiles):
      packed[column, first // plan.packed, part] = tile

  def shift_keys(column, part):
    start = column * LANES + first_key(part)
    for n in range(k_windows.shape[2]):
      k_windows[column, part, n] = _lanes_from(
          lambda tile: k_tiles[tile], start + n * LANES,
          start + num_keys(part))

  def prepare(column):
    """What a column needs before its first item, in small chores."""
    ready = 0 if column == 0 else column + tiles_before
    for tile in range(ready, column + tiles_before + 1):
      yield functools.partial(load_keys, tile)
    if plan.packed > 1:
      for first in range(0, plan.group, plan.packed):
        for x, packed in (q, packed_q), (do, packed_do):
          yield functools.partial(pack, x, packed, column, first)
    for part in range(plan.packed):
      yield functools.partial(shift_keys, column, part)

  def keys(item):
    found = [values(k_windows[item.column, item.part, n], dtype)
             for n in range(k_windows.shape[2])]
    return jnp.concatenate(found, 1)[:, :num_keys(item.part)]

  def queries(columns, packed, item):
    heads = range(item.heads, item.heads + plan.heads, plan.packed)
    return jnp.concatenate([
        values(load(columns, head, pl.ds(item.column * LANES, LANES))
               if plan.packed == 1 else packed[
                   item.column, head // plan.packed, item.part], dtype)
        for head in heads], 1)

  def add_dq(item, dq_HL):
    def store(head, tile):
      at = pl.ds(item.column * LANES, LANES)
      if interpreted:  # as in load
        dq[0, 0, head, :, at] = values(tile, dtype)
      else:
        words(dq)[0, 0, head, :, at] = tile

    dq_HL = words((plan.scale * dq_HL).astype(dtype))
    for n, head in enumerate(range(item.heads, item.heads + plan.heads,
                                   plan.packed)):
      tile, group = dq_HL[:, n * LANES:][:, :LANES], head // plan.packed
      if plan.packed == 1:
        store(head, tile)
        continue
      packed_dq[item.column, group, item.part] = tile
      if item.part == plan.packed - 1:
        tiles = [packed_dq[item.column, group, part]
                 for part in range(plan.packed)]
        for m, tile in enumerate(_swap(tiles)):
          store(head + m, tile)

  def add(total, item, gradient):
    start = item.column * LANES
    if plan.whole_tiles:
      start, part = start + first_key(item.part), 0
    else:
      part = item.part
    total[part, :, pl.ds(start, gradient.shape[1])] += gradient

  def write_keys(tile, total, to, factor):
    found = sum(
        _lanes_from(lambda t: total[part, :, pl.ds(t * LANES, LANES)],
                    tile * LANES + halo - (
                        0 if plan.whole_tiles else first_key(part)),
                    plan.rows + halo) for part in range(total.shape[0]))
    to[:, pl.ds(tile * LANES, LANES)] = (factor * found).astype(to.dtype)

  def finish(column):
    """After a column's last item: the keys that get no more."""
    last = columns if column == columns - 1 else column - tiles_before + 1
    for tile in range(max(0, column - tiles_before), last):
      yield functools.partial(write_keys, tile, dk_sum, dk, plan.scale)
      yield functools.partial(write_keys, tile, dv_sum, dv, 1)

  first_block = pl.program_id(2) == pl.num_programs(2) - 1
  items, chores = [], collections.defaultdict(list)
  each = plan.packed * plan.group // plan.heads  # items of a column
  for column in range(columns):
    for part in range(plan.packed):
      query = column * LANES + part * plan.sub
      items += [Item(column, part, heads, query + oldest(plan),
                     query + plan.sub, True)
                for heads in range(0, plan.group, plan.heads)]
    # Spread over the items of the column before, or of the one after.
    first = column * each
    for n, chore in enumerate(prepare(column)):
      chores[max(0, first - each + n % each)].append(chore)
    for n, chore in enumerate(finish(column)):
      chores[first + each + plan.lead + plan.lag + n % each].append(chore)
  Step(plan, dtype, -halo, functools.partial(queries, q, packed_q),
       functools.partial(queries, do, packed_do), keys, add_dq,
       functools.partial(add, dk_sum), functools.partial(add, dv_sum), lse,
       delta, kt, vt, segments, key_segments, mask_left, mask_right,
       jnp.where(first_block, -UNSEEN, 0.0)).run(items, chores)


def gradients(plan, q, k, v, do, lse, delta, segments, options):
  """dq, dk and dv of a narrow window, of whole blocks."""
  batch, num_kv_heads, group, head_dim, length = q.shape
  halo = plan.before
  rows, count, ratio = plan.rows, length // plan.rows, plan.rows // halo
  at = lambda i: count - 1 - i
  before = lambda i: jnp.maximum(at(i) * ratio - 1, 0)
  # Dimensions of 1 stay, for a reference without cannot be taken as words.
  q_spec = pl.BlockSpec((1, 1, group, head_dim, rows),
                        lambda b, h, i: (b, h, 0, 0, at(i)))
  row_spec = pl.BlockSpec((None, None, group, rows),
                          lambda b, h, i: (b, h, 0, at(i)))
  k_spec = pl.BlockSpec((None, None, head_dim, rows),
                        lambda b, h, i: (b, h, 0, at(i)))
  before_spec = pl.BlockSpec((None, None, head_dim, halo),
                             lambda b, h, i: (b, h, 0, before(i)))
  columns = rows // LANES
  args = [q, do, lse, delta, k, v, k, v]
  in_specs = [q_spec, q_spec, row_spec, row_spec, k_spec, k_spec, before_spec,
              before_spec]
  depth = head_dim
  if plan.mask_by_matmul:
    depth += 2 * plan.sub
    left, right = _mask_factors(plan)
    left = np.pad(left, ((0, 0), (head_dim, 0)))
    for x in left, right:
      x = x.astype(q.dtype).view(np.uint16).astype(np.uint32)
      x = (x[::2] | x[1::2] << 16).view(np.int32)  # words
      args.append(jnp.asarray(x))
      in_specs.append(pl.BlockSpec(x.shape, lambda b, h, i: (0, 0)))
  if segments is not None:
    args += [*segments, segments[1]]
    in_specs += [
        *[pl.BlockSpec((None, 1, rows), lambda b, h, i: (b, 0, at(i)))] * 2,
        pl.BlockSpec((None, 1, halo), lambda b, h, i: (b, 0, before(i)))]
  keys = halo + rows
  reach = halo // LANES + 1
  sums = 1 if plan.whole_tiles else plan.packed
  scratch = [kept(keys, depth, q.dtype), kept(keys, head_dim, q.dtype),
             kept(keys // LANES, head_dim, LANES, q.dtype),
             kept(columns, plan.packed, reach, head_dim, LANES, q.dtype),
             *[pltpu.VMEM((sums, head_dim, keys), jnp.float32)] * 2]
  if plan.packed > 1:
    scratch += [kept(columns, group // plan.packed, plan.packed,
                      head_dim, LANES, q.dtype)] * 3
  if segments is not None:
    scratch.append(pltpu.VMEM((keys, LANES), jnp.int32))
  return pl.pallas_call(
      functools.partial(_kernel, plan=plan,
                        has_segments=segments is not None,
                        interpreted=bool(options.interpret)),
      grid=(batch, num_kv_heads, count), in_specs=in_specs,
      out_specs=[q_spec, k_spec, k_spec],
      out_shape=[vma.shape_like(x, x.shape) for x in (q, k, v)],
      scratch_shapes=scratch, interpret=options.interpret,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary"),
          vmem_limit_bytes=tpu_blocks.vmem_limit(platforms.tpu_generation())),
      cost_estimate=cost(
          batch * num_kv_heads * group * length * (plan.sub - oldest(plan)), 5,
          head_dim, *args[:6], q, k, v),
      name="windowed_attention_backward")(*args)
