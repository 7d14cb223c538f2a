"""The backward pass of windowed attention on TPU.

Scores lie transposed, [keys, queries], as in the forward kernels: with
P = exp(S - lse) and dS = P (V^T dO - delta), delta = sum(o dO),
  dQ = K dS,   dK = Q dS^T,   dV = dO P^T.
Three schedules, all with blocks of queries that hold all G query heads of a
key head, so that dK and dV are summed over them in VMEM, in float32:

- narrow (a window of up to 256 keys): a step reads a block of queries, its
  keys and those just before it, and does the whole band between them. Blocks
  are walked from the last to the first: of the keys of a block only those
  before it get more to come, and what they have is kept for the next step. So
  each pair of a query and a key is computed once, each array is read and
  written once, and nothing needs an atomic or a partial sum in HBM.
- wide: the same walk, with the key blocks of a query block as the inner grid
  dimension; a ring of accumulators in VMEM holds dK and dV of the blocks
  within the window (or of all keys, without a window).
- apart: where that ring is too large for VMEM, dQ in one pass and dK and dV
  in another, which computes the scores twice.

A matmul of head_dim 64 leaves half of a 128 deep systolic array idle, three
quarters of a 256 deep one. The narrow schedule masks with that half: below
K^T stand one-hot columns, below Q rows of 0 and 1, whose product is a very
negative number at every key that a query must not see (_mask_factors); so a
mask costs no vector operation. And a tile of 128 lanes holds, instead of 128
queries of one head, `sub` = 32 queries of each of four heads (_swap): these
see 128 + 32 keys and not 128 + 128. In units of one pass of a [128, 128]
tile, S and dP then cost 2 * 1.25 instead of 2 * 2; dQ, dK and dV (64 rows) 3
as before.
"""
import collections
import functools
import math
import typing

import jax
from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import numpy as np

from pallas_kernels import platforms
from pallas_kernels.windowed_attention import tpu_blocks
from pallas_kernels.windowed_attention.tpu_blocks import BackwardBlocks

LOG2_E = math.log2(math.e)
LANES = 128
UNSEEN = -1e30  # finite: its product with 0 is 0
ROWS = ((1,), (1,)), ((), ())  # contracts the lanes of both
NARROW = 257  # the widest window of the narrow schedule
BLOCKS_BYTES = 16 << 20  # of VMEM for blocks of queries
RING_BYTES = 10 << 20  # and for the sums of the wide schedule


def _multiply(x, y, dimensions=(((1,), (0,)), ((), ()))):
  """A matmul into float32; of float32 as precise as it can be."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, y, dimensions, precision=precision,
                         preferred_element_type=jnp.float32)


class _Plan(typing.NamedTuple):
  """What a kernel is built from, besides shapes."""
  window: int
  scale: float
  soft_cap: float | None
  group: int  # query heads of a key head
  rows: int  # queries, and keys, of a block
  sub: int  # queries of a head in an item's lanes
  heads: int  # in an item's lanes
  lead: int  # items whose scores are asked for before one's are used
  lag: int
  blocks_before: int  # of keys, which a block of queries reaches
  mask_by_matmul: bool = False

  @property
  def lanes(self):
    return self.sub * self.heads

  @property
  def packed(self):
    """Heads that share 128 lanes."""
    return max(1, LANES // self.sub)

  @property
  def column(self):
    """Queries of a head that are loaded together."""
    return max(LANES, self.sub)


class _Item(typing.NamedTuple):
  """Lanes of scores, and the tiles of 128 keys that they are taken with.

  Positions count from the first query of the block.
  """
  column: int  # of the queries
  part: int  # of the column, `sub` queries
  heads: typing.Any  # first of them: an int, or a loop's counter
  tiles: tuple  # first and last (not included) tile of the keys
  start: int  # position of the first key row used
  stop: int
  masked: bool

  def query(self, plan):
    return self.column * plan.column + self.part * plan.sub


def _items(plan, column, part, heads, first_tile, last_tile, tiles=2):
  """Items of a part of a column, of up to so many tiles of keys each."""
  query = column * plan.column + part * plan.sub
  oldest = (query - plan.window + 1) // 16 * 16
  start = max(first_tile * LANES, oldest)
  stop = min(last_tile * LANES, query + plan.sub)
  found = []
  while start < stop:
    first = start // LANES
    end = min(stop, (first + tiles) * LANES)
    masked = (end - 1 > query
              or start < query + plan.sub - plan.window)
    found.append(_Item(column, part, heads, (first, -(-end // LANES)), start,
                       end, masked))
    start = end
  return found


def _pipeline(plan, items, scores, softmax, gradients):
  """The three stages of each item, those of several items interleaved, for
  results of the matrix unit come in program order."""
  a, b = collections.deque(), collections.deque()
  for n in range(len(items) + plan.lead + plan.lag):
    if n < len(items):
      a.append(scores(items[n]))
    if 0 <= n - plan.lead < len(items):
      b.append(softmax(items[n - plan.lead], *a.popleft()))
    if n >= plan.lead + plan.lag:
      gradients(items[n - plan.lead - plan.lag], *b.popleft())


def _words(x):
  """A reference to, or an array of, bfloat16 as int32, two rows in one.

  Such a register loads and stores as a whole: 16 rows of bfloat16 lie in
  memory as two tiles of 8 rows, which it takes further instructions to join.
  """
  if x.dtype.itemsize == 4:
    return x
  return (pltpu.bitcast(x, jnp.int32) if isinstance(x, jax.Array)
          else x.bitcast(jnp.int32))


def _values(x, dtype):
  """Undoes _words for an array."""
  return x if x.dtype == dtype else pltpu.bitcast(x, dtype)


def _swap(tiles):
  """Of m arrays of words [rows, 128], of m blocks of lanes, block j of array i becomes
  block i of array j: from a head each to a part of the queries each."""
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


def _row(x_GT, plan, column, part, first_head):
  """A statistic [1, lanes] for the lanes of an item, from one per head."""
  m, width = plan.packed, plan.sub
  x = x_GT[:, pl.ds(column * plan.column, plan.column)]
  head = lax.broadcasted_iota(jnp.int32, x.shape, 0)
  if m == 1:  # the head may be a loop's counter, which cannot index sublanes
    return jnp.concatenate([
        jnp.sum(jnp.where(head == first_head + i, x, 0), 0, keepdims=True)
        for i in range(plan.heads)], 1)
  block = lax.broadcasted_iota(jnp.int32, x.shape, 1) // width
  # Block a takes what stands in block `part`.
  moved = x
  for a in range(m):
    if a != part:
      moved = jnp.where(block == a, pltpu.roll(x, (a - part) % m * width, 1),
                        moved)
  return jnp.concatenate([
      jnp.sum(jnp.where(head == first_head + i + block, moved, 0), 0,
              keepdims=True) for i in range(0, plan.heads, m)], 1)


def _mask_factors(plan):
  """Left [keys, 2 sub] and right [2 sub, lanes], whose product is UNSEEN where
  a query must not see a key and 0 elsewhere, with one product at most in a
  sum, for the keys from the oldest that the first query of a part sees."""
  sub, window = plan.sub, plan.window
  query = np.arange(plan.lanes) % sub
  key = np.arange((1 - window) // 16 * 16, sub)
  left = np.zeros((len(key), 2 * sub), np.float32)
  index = np.arange(sub)[:, None]
  right = np.concatenate([query < index, query >= index]).astype(np.float32)
  ahead = key >= 1  # not seen by queries before the key
  left[ahead, key[ahead]] = UNSEEN
  behind = np.maximum(key + window, 0)  # not seen by queries from there on
  old = behind < sub
  left[old, sub + behind[old]] = UNSEEN
  return left, right


class _Step:
  """The work of one grid step on its items; references are attributes.

  first_tile: tile of 128 keys, counted from the block's first query, that
    the first rows of kt and vt and the first lanes of keys hold.
  """

  def __init__(self, plan, first_tile, dtype, **references):
    self.plan, self.first_tile, self.dtype = plan, first_tile, dtype
    self.__dict__.update(references)

  def rows(self, x, first, count):
    """Rows of an array that is kept as words."""
    each = 4 // self.dtype.itemsize
    return _values(x[pl.ds(first // each, count // each)], self.dtype)

  def scores(self, item):
    plan = self.plan
    if self.pack is not None and item.part == 0 and item.heads == 0:
      self.pack(item.column)
    first = item.start - self.first_tile * LANES
    k, q = self.rows(self.kt, first, item.stop - item.start), self.q(item)
    if plan.mask_by_matmul:
      oldest = item.query(plan) + (1 - plan.window) // 16 * 16
      left = self.rows(self.mask_left, item.start - oldest,
                       item.stop - item.start)
      k = _values(_words(k) | _words(left), self.dtype)
      q = jnp.concatenate([q, _values(self.mask_right[...], self.dtype)], 0)
    do = self.do(item)
    v = self.rows(self.vt, first, item.stop - item.start)
    return _multiply(k, q), _multiply(v, do)

  def seen(self, item):
    """Where queries see keys, or None where they all do."""
    plan, shape = self.plan, (item.stop - item.start, self.plan.lanes)
    seen = None
    if item.masked and not plan.mask_by_matmul:
      lane = lax.broadcasted_iota(jnp.int32, shape, 1) % plan.sub
      distance = lane - lax.broadcasted_iota(jnp.int32, shape, 0)
      distance += item.query(plan) - item.start
      seen = (distance >= 0) & (distance < plan.window)
    if self.key_segments is not None:
      rows = pl.ds(item.start - self.first_tile * LANES, shape[0])
      columns = pl.ds(item.column * plan.column, plan.column)
      q = jnp.concatenate([self.segments[:, columns]] * plan.heads, 1)
      k = jnp.concatenate(
          [self.key_segments[rows]] * (plan.lanes // LANES), 1)
      seen = (k == q) if seen is None else seen & (k == q)
    return seen

  def softmax(self, item, s, dp):
    """P and dS, of the inputs' dtype."""
    plan = self.plan
    args = plan, item.column, item.part, item.heads
    lse = LOG2_E * _row(self.lse, *args)
    slope = None
    if plan.soft_cap is None:
      s = s * (plan.scale * LOG2_E)
    else:
      tanh = jnp.tanh(s * (plan.scale / plan.soft_cap))
      s, slope = tanh * (plan.soft_cap * LOG2_E), 1 - tanh * tanh
    before = min(max(-item.start, 0), s.shape[0])
    if before and self.halo_unseen is not None:
      # Keys before the first: another block stands in for them.
      p = jnp.exp2(s[:before] - (lse + self.halo_unseen))
      if before < s.shape[0]:
        p = jnp.concatenate([p, jnp.exp2(s[before:] - lse)], 0)
    else:
      p = jnp.exp2(s - lse)
    if (seen := self.seen(item)) is not None:
      p = jnp.where(seen, p, 0)
    ds = p * (dp - _row(self.delta, *args))
    if slope is not None:
      ds *= slope
    return [self.tiles_of(item, x).astype(self.dtype) for x in (p, ds)]

  def tiles_of(self, item, x):
    """Rows of scores as whole tiles of keys, zero elsewhere."""
    first, last = item.tiles
    zeros = lambda rows: [jnp.zeros((rows, x.shape[1]), x.dtype)] * bool(rows)
    return jnp.concatenate([*zeros(item.start - first * LANES), x,
                            *zeros(last * LANES - item.stop)], 0)

  def gradients(self, item, p, ds):
    first, last = (tile - self.first_tile for tile in item.tiles)
    if self.add_dq is not None:
      self.add_dq(item, _multiply(self.keys(first, last), ds))
    if self.dk is not None:
      lanes = pl.ds(first * LANES, (last - first) * LANES)
      self.dk[:, lanes] += _multiply(
          self.q(item), ds, ROWS)
      self.dv[:, lanes] += _multiply(
          self.do(item), p, ROWS)

  def run(self, items):
    _pipeline(self.plan, items, self.scores, self.softmax, self.gradients)


def _transpose(to, x, first=0, tiles=None):
  """Writes x [head_dim, keys] into [keys, head_dim], with zeros beside, and as
  it is into [tiles of 128 keys, head_dim, 128]."""
  zeros = [jnp.zeros((to.shape[1] - x.shape[0], LANES), x.dtype)]
  zeros = zeros if to.shape[1] > x.shape[0] else []
  for start in range(0, x.shape[1], LANES):
    tile = x[:, start:start + LANES]
    if tiles is not None:
      tiles[(first + start) // LANES] = _words(tile)
    turned = _words(jnp.concatenate([tile, *zeros], 0).T)
    rows = turned.shape[0]
    to[pl.ds((first + start) // LANES * rows, rows)] = turned


def _segments_down(to, segments, first=0):
  """Writes segments [1, keys] into [keys, 128]: one to a row."""
  for start in range(0, segments.shape[1], LANES):
    row = segments[:, start:start + LANES]
    to[pl.ds(first + start, LANES)] = jnp.broadcast_to(row, (LANES, LANES)).T


class _Names:
  """Takes references off a list, by turns."""

  def __init__(self, refs):
    self.refs = iter(refs)

  def one(self, present=True):
    return next(self.refs) if present else None

  def take(self, count, present=True):
    return [self.one(present) for _ in range(count)]


def _narrow_kernel(*refs, plan, has_segments):
  names = _Names(refs)
  q, do = (names.take(plan.rows // LANES) for _ in range(2))
  lse, delta, k, v, k_before, v_before = names.take(6)
  mask_left, mask_right = names.take(2, plan.mask_by_matmul)
  segments, segments_before = names.take(2, has_segments)
  dq, dk, dv, kt, vt, key_tiles, dk_sum, dv_sum = names.take(8)
  packed_q, packed_do, packed_dq = names.take(3, plan.packed > 1)
  key_segments = names.one(has_segments)
  halo, dtype = k_before.shape[1], k.dtype
  i = pl.num_programs(2) - 1 - pl.program_id(2)

  for to, before, x, tiles in ((kt, k_before, k, key_tiles),
                               (vt, v_before, v, None)):
    _transpose(to, before[...], 0, tiles)
    _transpose(to, x[...], halo, tiles)
  if has_segments:
    _segments_down(key_segments, segments_before[...])
    _segments_down(key_segments, segments[...], halo)
  for x in dk_sum, dv_sum:
    # What the step before, of later queries, has found for our last keys.
    later = jnp.where(pl.program_id(2) == 0, 0, x[:, :halo])
    x[:, :plan.rows] = jnp.zeros_like(x[:, :plan.rows])
    x[:, plan.rows:] = later

  def keys(first, last):
    return jnp.concatenate([_values(key_tiles[t], dtype)
                            for t in range(first, last)], 1)

  def pack(column):
    for x, packed in (q, packed_q), (do, packed_do):
      for first in range(0, plan.group, plan.packed):
        tiles = _swap([_words(x[column])[0, 0, first + n]
                       for n in range(plan.packed)])
        for part, tile in enumerate(tiles):
          packed[column, first // plan.packed, part] = tile

  def queries(columns, packed, item):
    heads = range(item.heads, item.heads + plan.heads, plan.packed)
    return jnp.concatenate([
        columns[item.column][0, 0, head] if plan.packed == 1 else
        _values(packed[item.column, head // plan.packed, item.part], dtype)
        for head in heads], 1)

  def add_dq(item, dq_HL):
    dq_HL = _words((plan.scale * dq_HL).astype(dtype))
    width = max(LANES, plan.sub)
    columns = pl.ds(item.column * plan.column, plan.column)
    for n, head in enumerate(range(item.heads, item.heads + plan.heads,
                                   plan.packed)):
      tile = dq_HL[:, n * width:(n + 1) * width]
      if plan.packed == 1:
        _words(dq)[0, 0, head, :, columns] = tile
        continue
      group = head // plan.packed
      packed_dq[item.column, group, item.part] = tile
      if item.part == plan.packed - 1:
        tiles = [packed_dq[item.column, group, part]
                 for part in range(plan.packed)]
        for m, tile in enumerate(_swap(tiles)):
          _words(dq)[0, 0, head + m, :, columns] = tile

  first_tile = -halo // LANES
  items = []
  for column in range(plan.rows // plan.column):
    for part in range(plan.packed):
      for heads in range(0, plan.group, plan.heads):
        items += _items(plan, column, part, heads, first_tile,
                        plan.rows // LANES, plan.rows)
  _Step(plan, first_tile, dtype, q=functools.partial(queries, q, packed_q),
        do=functools.partial(queries, do, packed_do), lse=lse, delta=delta,
        kt=kt, vt=vt, mask_left=mask_left, mask_right=mask_right,
        segments=segments, key_segments=key_segments, halo_unseen=jnp.where(i == 0, -UNSEEN, 0.0), keys=keys,
        pack=pack if plan.packed > 1 else None, add_dq=add_dq, dk=dk_sum,
        dv=dv_sum).run(items)
  dk[...] = (plan.scale * dk_sum[:, halo:]).astype(dk.dtype)
  dv[...] = dv_sum[:, halo:].astype(dv.dtype)


def _wide_kernel(*refs, plan, has_segments, want_q, want_k):
  names = _Names(refs)
  q, do, lse, delta, k, v = names.take(6)
  segments, segments_k = names.take(2, has_segments)
  dq = names.one(want_q)
  dk, dv = names.take(2, want_k)
  kt, vt = names.take(2)
  dq_sum = names.one(want_q)
  dk_ring, dv_ring = names.take(2, want_k)
  key_segments = names.one(has_segments)
  num_blocks, steps = pl.num_programs(2), pl.num_programs(3)
  j = pl.program_id(3)  # how many blocks the keys lie before the queries
  if want_q:
    i = num_blocks - 1 - pl.program_id(2)
    present, slot = j <= i, (i - j + steps) % steps
  else:
    i = pl.program_id(2) + j
    present, slot = i < num_blocks, 0

  if want_q:
    @pl.when(j == 0)
    def _():
      dq_sum[...] = jnp.zeros_like(dq_sum)

  if want_k:
    @pl.when((j == steps - 1) | (i == num_blocks - 1) if want_q else j == 0)
    def _():
      for ring in dk_ring, dv_ring:
        ring[slot] = jnp.zeros_like(ring[slot])

  def compute(blocks_before, plan):
    def add_dq(item, dq_HL):
      columns = pl.ds(item.column * plan.column, plan.column)
      for n in range(plan.heads):
        dq_sum[item.heads + n, :, columns] += (
            dq_HL[:, n * plan.column:(n + 1) * plan.column])

    def queries(x, item):
      columns = pl.ds(item.column * plan.column, plan.column)
      return jnp.concatenate([x[item.heads + n, :, columns]
                              for n in range(plan.heads)], 1)

    tiles = plan.rows // LANES
    first_tile = -blocks_before * tiles
    step = _Step(
        plan, first_tile, k.dtype, q=functools.partial(queries, q),
        do=functools.partial(queries, do), lse=lse, delta=delta, kt=kt, vt=vt,
        pack=None, segments=segments, key_segments=key_segments,
        halo_unseen=None,
        keys=lambda first, last: k[:, pl.ds(first * LANES,
                                            (last - first) * LANES)],
        add_dq=add_dq if want_q else None,
        dk=dk_ring.at[slot] if want_k else None,
        dv=dv_ring.at[slot] if want_k else None)

    def heads(n, _):
      items = []
      for column in range(plan.rows // plan.column):
        items += _items(plan, column, 0, n * plan.heads, first_tile,
                        first_tile + tiles)
      step.run(items)
    lax.fori_loop(0, plan.group // plan.heads, heads, None)

  @pl.when(present)
  def _():
    _transpose(kt, k[...])
    _transpose(vt, v[...])
    if has_segments:
      _segments_down(key_segments, segments_k[...])

  # Only where an edge of the band passes is a mask needed.
  inside = max(1, plan.window // plan.rows)  # blocks before: 1 to inside - 1
  for blocks_before in (0, *range(inside, plan.blocks_before + 1)):
    pl.when(present & (j == blocks_before))(
        functools.partial(compute, blocks_before, plan))
  if inside > 1:
    pl.when(present & (j > 0) & (j < inside))(
        functools.partial(compute, 1, plan._replace(window=4 * plan.rows)))

  if want_q:
    @pl.when(j == steps - 1)
    def _():
      dq[...] = (plan.scale * dq_sum[...]).astype(dq.dtype)

  if want_k:
    @pl.when(j == (0 if want_q else steps - 1))
    def _():
      dk[...] = (plan.scale * dk_ring[slot]).astype(dk.dtype)
      dv[...] = dv_ring[slot].astype(dv.dtype)


def _kept(*shape_and_dtype):
  """Scratch for an array that is kept as words."""
  *shape, dtype = shape_and_dtype
  shape[-2] //= 4 // dtype.itemsize
  return pltpu.VMEM(tuple(shape), jnp.float32 if dtype.itemsize == 4
                    else jnp.int32)


def _narrow(plan, q, k, v, do, lse, delta, segments, options):
  """dq, dk and dv of a narrow window, of whole blocks."""
  batch, num_kv_heads, group, head_dim, length = q.shape
  halo = plan.blocks_before
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
  # By columns: a register's 16 rows of bfloat16 then lie together in VMEM.
  columns = rows // LANES
  column_specs = [pl.BlockSpec(
      (1, 1, group, head_dim, LANES),
      lambda b, h, i, c=c: (b, h, 0, 0, at(i) * columns + c))
                  for c in range(columns)]
  args = [*[q] * columns, *[do] * columns, lse, delta, k, v, k, v]
  in_specs = [*column_specs, *column_specs, row_spec, row_spec, k_spec, k_spec, before_spec,
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
    args += [segments, segments]
    in_specs += [pl.BlockSpec((None, 1, rows), lambda b, h, i: (b, 0, at(i))),
                 pl.BlockSpec((None, 1, halo),
                              lambda b, h, i: (b, 0, before(i)))]
  keys = halo + rows
  scratch = [_kept(keys, depth, q.dtype), _kept(keys, head_dim, q.dtype),
             _kept(keys // LANES, head_dim, LANES, q.dtype),
             *[pltpu.VMEM((head_dim, keys), jnp.float32)] * 2]
  if plan.packed > 1:
    scratch += [_kept(rows // LANES, group // plan.packed, plan.packed,
                      head_dim, LANES, q.dtype)] * 3
  if segments is not None:
    scratch.append(pltpu.VMEM((keys, LANES), jnp.int32))
  return pl.pallas_call(
      functools.partial(_narrow_kernel, plan=plan,
                        has_segments=segments is not None),
      grid=(batch, num_kv_heads, count), in_specs=in_specs,
      out_specs=[q_spec, k_spec, k_spec],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
      scratch_shapes=scratch, interpret=options.interpret,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary"),
          vmem_limit_bytes=tpu_blocks.vmem_limit(platforms.tpu_generation())),
      name="windowed_attention_backward")(*args)


def _wide(plan, q, k, v, do, lse, delta, segments, options, want_q=True,
          want_k=True):
  """dq and dk, dv where wanted, of any window, of whole blocks."""
  batch, num_kv_heads, group, head_dim, length = q.shape
  rows, count, steps = plan.rows, length // plan.rows, plan.blocks_before + 1
  if want_q:
    q_at = lambda i, j: count - 1 - i
    k_at = lambda i, j: jnp.maximum(count - 1 - i - j, 0)
    dk_at = q_at
  else:
    q_at = lambda i, j: jnp.minimum(i + j, count - 1)
    k_at = dk_at = lambda i, j: i
  def spec(at, *shape):
    zeros = (0,) * (len(shape) - 1)
    return pl.BlockSpec((None, None, *shape),
                        lambda b, h, i, j: (b, h, *zeros, at(i, j)))
  q_spec = spec(q_at, group, head_dim, rows)
  row_spec = spec(q_at, group, rows)
  args = [q, do, lse, delta, k, v]
  in_specs = [q_spec, q_spec, row_spec, row_spec,
              *[spec(k_at, head_dim, rows)] * 2]
  if segments is not None:
    for at in q_at, k_at:
      args.append(segments)
      in_specs.append(pl.BlockSpec(
          (None, 1, rows), lambda b, h, i, j, at=at: (b, 0, at(i, j))))
  out, out_specs = [], []
  scratch = [_kept(rows, head_dim, q.dtype)] * 2
  if want_q:
    out.append(q)
    out_specs.append(q_spec)
    scratch.append(pltpu.VMEM((group, head_dim, rows), jnp.float32))
  if want_k:
    out += [k, v]
    out_specs += [spec(dk_at, head_dim, rows)] * 2
    slots = steps if want_q else 1
    scratch += [pltpu.VMEM((slots, head_dim, rows), jnp.float32)] * 2
  if segments is not None:
    scratch.append(pltpu.VMEM((rows, LANES), jnp.int32))
  return pl.pallas_call(
      functools.partial(_wide_kernel, plan=plan, want_q=want_q, want_k=want_k,
                        has_segments=segments is not None),
      grid=(batch, num_kv_heads, count, steps), in_specs=in_specs,
      out_specs=out_specs, scratch_shapes=scratch,
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary",
                               "arbitrary"),
          vmem_limit_bytes=tpu_blocks.vmem_limit(platforms.tpu_generation())),
      interpret=options.interpret, name="windowed_attention_backward")(*args)


def _gradients(q, k, v, do, lse, delta, segments, options, blocks):
  """Of arrays [B, K, (G,) H, positions], queries and keys at the same."""
  group, head_dim, length = q.shape[2:]
  generation = platforms.tpu_generation()
  window = length if options.window is None else min(options.window, length)
  rows = min(blocks.rows, -(-length // LANES) * LANES)
  narrow = window <= NARROW
  halo = LANES if window <= LANES + 1 else 2 * LANES
  if narrow:
    rows = -(-rows // halo) * halo
  else:
    # Blocks of queries, twice, and their sums within a share of VMEM.
    while rows > LANES and (
        group * head_dim * rows * (6 * q.dtype.itemsize + 4) > BLOCKS_BYTES):
      rows = max(LANES, rows // 2 // LANES * LANES)
  whole = -(-length // rows) * rows
  def padded(x, value=0):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, whole - length)],
                   constant_values=value)
  q, k, v, do, delta = map(padded, (q, k, v, do, delta))
  lse = padded(lse, -UNSEEN)  # no query there sees a key
  if segments is not None:
    segments = padded(segments)[:, None]
  args = q, k, v, do, lse, delta, segments, options

  plan = _Plan(window, options.scale, options.soft_cap, group, rows, LANES,
               math.gcd(group, blocks.lanes // LANES), blocks.lead, blocks.lag,
               halo)
  if narrow:
    sub = LANES // math.gcd(group, LANES // blocks.sub)
    depth = 256 if generation in ("v6e", "7x", None) else 128
    if (segments is None and options.soft_cap is None and options.scale > 0
        and q.dtype == jnp.bfloat16 and head_dim + 2 * sub <= depth):
      heads = LANES // sub
      heads *= math.gcd(group // heads, blocks.lanes // LANES)
      plan = plan._replace(sub=sub, heads=heads, mask_by_matmul=True)
    gradients = _narrow(plan, *args)
  else:
    if plan.lanes < blocks.lanes and rows % blocks.lanes == 0:
      plan = plan._replace(sub=blocks.lanes // plan.heads)
    before = min(-(-(window - 1) // rows), whole // rows - 1)
    plan = plan._replace(blocks_before=before)
    ring = 8 * head_dim * rows * (before + 1)
    if ring <= RING_BYTES:
      gradients = _wide(plan, *args)
    else:
      gradients = (*_wide(plan, *args, want_k=False),
                   *_wide(plan, *args, want_q=False))
  return [x[..., :length] for x in gradients]


def backward(q_BNHT, k_BKHS, v_BKHS, sinks_N, segment_ids_BS, o_BNHT, lse_BNT,
             do_BNHT, options, blocks):
  """Gradients of q, k, v as these lie, and of the sinks, float32, or None."""
  batch, num_heads, head_dim, num_queries = q_BNHT.shape
  num_kv_heads, num_keys = k_BKHS.shape[1], k_BKHS.shape[3]
  if blocks is None:
    blocks = tpu_blocks.backward_blocks(platforms.tpu_generation())
  delta_BNT = jnp.sum(o_BNHT.astype(jnp.float32)
                      * do_BNHT.astype(jnp.float32), 2)
  # Keys that no query sees are left out; queries of no effect stand before
  # the first, so that queries and keys begin at one position.
  first = 0 if options.window is None else max(
      0, options.q_offset - options.window + 1)
  last = options.q_offset + num_queries
  def seen(x):
    return x[..., first:last]
  def grouped(x, value=0):
    x = x.reshape(batch, num_kv_heads, -1, *x.shape[2:])
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1)
                   + [(options.q_offset - first, 0)], constant_values=value)
  dq, dk, dv = _gradients(
      grouped(q_BNHT), seen(k_BKHS), seen(v_BKHS), grouped(do_BNHT),
      grouped(lse_BNT, -UNSEEN), grouped(delta_BNT),
      None if segment_ids_BS is None else seen(segment_ids_BS).astype(
          jnp.int32), options, blocks)
  dq = dq[..., options.q_offset - first:].reshape(q_BNHT.shape)
  dk, dv = (jnp.pad(x, [(0, 0)] * 3 + [(first, num_keys - last)])
            for x in (dk, dv))
  dsinks_N = None
  if sinks_N is not None:
    sinks = sinks_N.astype(jnp.float32)[:, None]
    dsinks_N = -jnp.sum(jnp.exp(sinks - lse_BNT) * delta_BNT, (0, 2))
  return dq, dk, dv, dsinks_N
