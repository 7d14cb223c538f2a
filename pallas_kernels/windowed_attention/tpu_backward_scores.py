"""What the schedules of the TPU backward share: the scores of a tile, twice.

Scores lie transposed, [keys, queries]. An item is a tile of lanes (queries of
one head or of several) against a range of keys; for it are computed
  S = K^T Q,  P = exp(S - lse),  dP = V^T dO,  dS = P (dP - delta),
  dQ = K dS,  dK = Q dS^T,  dV = dO P^T,
five matmuls. P needs neither maximum nor sum, for lse is known. The factor
`scale` of dQ and dK is left to whoever sums them. bfloat16 is kept as words of
two rows (words), since a register of it loads and stores as one only so.
"""
import collections
import dataclasses
import math
import typing

import jax
from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2_E = math.log2(math.e)
LANES = 128
UNSEEN = -1e30  # finite: its product with 0 is 0
ROWS = ((1,), (1,))  # contracts the lanes of both


def multiply(x, y, contract=((1,), (0,))):
  """A matmul into float32; of float32 as precise as it can be."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(x, y, (contract, ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


class Plan(typing.NamedTuple):
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
  before: int  # keys, or blocks of them, before a block, that it reaches
  array: int  # width and depth of the matrix unit: 128 or 256
  mask_by_matmul: bool = False

  @property
  def lanes(self):
    return self.sub * self.heads

  @property
  def whole_tiles(self):
    """Whether P and dS are padded to multiples of 128 keys: what is gained in
    pushing less into the matrix unit is not worth the shifts, where its
    matmuls are the bound."""
    return self.array == 128

  @property
  def packed(self):
    """Heads that share 128 lanes."""
    return max(1, LANES // self.sub)

  @property
  def column(self):
    """Queries of a head that are loaded together."""
    return max(LANES, self.sub)


class Item(typing.NamedTuple):
  """Lanes of scores, and the keys, from start to stop, they are taken with.

  Positions count from the first query of the block.
  """
  column: int  # of the queries
  part: int  # of the column, `sub` queries
  heads: typing.Any  # first of them: an int, or a loop's counter
  start: int
  stop: int
  masked: bool

  def query(self, plan):
    return self.column * plan.column + self.part * plan.sub

  @property
  def keys(self):
    return self.stop - self.start


def words(x):
  """A reference to, or an array of, bfloat16 as int32, two rows in one.

  Such a register loads and stores as a whole: 16 rows of bfloat16 lie in
  memory as two tiles of 8 rows, which it takes further instructions to join.
  """
  if x.dtype.itemsize == 4:
    return x
  return (pltpu.bitcast(x, jnp.int32) if isinstance(x, jax.Array)
          else x.bitcast(jnp.int32))


def values(x, dtype):
  """Undoes words for an array."""
  return x if x.dtype == dtype else pltpu.bitcast(x, dtype)


def row(x_GT, plan, column, part, first_head):
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


@dataclasses.dataclass
class Step:
  """The work of a grid step on its items, with what the schedule provides.

  q, do, keys: functions of an item that give [head_dim, lanes or keys].
  add_dq, add_dk, add_dv: functions of an item and its share of a gradient;
    None where it is not wanted.
  kt, vt: keys and values as words of [keys, head_dim], from the position
    `first_key` on; key_segments: [keys, 128] likewise.
  halo_unseen: subtracted from the scores of keys before the block.
  """
  plan: Plan
  dtype: typing.Any
  first_key: int
  q: typing.Callable
  do: typing.Callable
  keys: typing.Callable
  add_dq: typing.Callable | None
  add_dk: typing.Callable | None
  add_dv: typing.Callable | None
  lse: typing.Any  # [heads, queries]
  delta: typing.Any
  kt: typing.Any
  vt: typing.Any
  segments: typing.Any = None  # [1, queries]
  key_segments: typing.Any = None
  mask_left: typing.Any = None
  mask_right: typing.Any = None
  halo_unseen: typing.Any = None

  def rows(self, x, first, count):
    """Rows of an array that is kept as words."""
    each = 4 // self.dtype.itemsize
    return values(x[pl.ds(first // each, count // each)], self.dtype)

  def scores(self, item):
    plan = self.plan
    first = item.start - self.first_key
    k, q = self.rows(self.kt, first, item.keys), self.q(item)
    if plan.mask_by_matmul:
      oldest = item.query(plan) + (1 - plan.window) // 16 * 16
      left = self.rows(self.mask_left, item.start - oldest, item.keys)
      k = values(words(k) | words(left), self.dtype)
      q = jnp.concatenate([q, values(self.mask_right[...], self.dtype)], 0)
    v = self.rows(self.vt, first, item.keys)
    return multiply(k, q), multiply(v, self.do(item))

  def seen(self, item):
    """Where queries see keys, or None where they all do."""
    plan, shape = self.plan, (item.keys, self.plan.lanes)
    seen = None
    if item.masked and not plan.mask_by_matmul:
      lane = lax.broadcasted_iota(jnp.int32, shape, 1) % plan.sub
      distance = lane - lax.broadcasted_iota(jnp.int32, shape, 0)
      distance += item.query(plan) - item.start
      seen = (distance >= 0) & (distance < plan.window)
    if self.key_segments is not None:
      rows = pl.ds(item.start - self.first_key, item.keys)
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
    lse = LOG2_E * row(self.lse, *args)
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
    ds = p * (dp - row(self.delta, *args))
    if slope is not None:
      ds *= slope
    return [self.padded(item, x).astype(self.dtype) for x in (p, ds)]

  def padded(self, item, x):
    """Rows for whole tiles of keys if asked for, zero beside the item's."""
    if not self.plan.whole_tiles:
      return x
    zeros = [jnp.zeros((rows, x.shape[1]), x.dtype)
             for rows in (item.start % LANES, -item.stop % LANES)]
    return jnp.concatenate([z for z in (zeros[0], x, zeros[1]) if z.shape[0]],
                           0)

  def gradients(self, item, p, ds):
    if self.add_dq is not None:
      self.add_dq(item, multiply(self.keys(item), ds))
    if self.add_dk is not None:
      self.add_dk(item, multiply(self.q(item), ds, ROWS))
      self.add_dv(item, multiply(self.do(item), p, ROWS))

  def run(self, items, chores=None):
    """All items, those of several interleaved by stages, since the matrix
    unit's results come in program order.

    chores: lists of functions to be called before the item of an index, or,
      past the last, after so many stages.
    """
    lead, lag = self.plan.lead, self.plan.lag
    scores, factors = collections.deque(), collections.deque()
    for n in range(len(items) + lead + lag):
      for chore in chores[n] if chores else ():
        chore()
      if n < len(items):
        scores.append(self.scores(items[n]))
      if 0 <= n - lead < len(items):
        factors.append(self.softmax(items[n - lead], *scores.popleft()))
      if n >= lead + lag:
        self.gradients(items[n - lead - lag], *factors.popleft())
    for n in sorted(chores or ()):
      if n >= len(items) + lead + lag:
        for chore in chores[n]:
          chore()


def turn(x, width):
  """[head_dim, 128] as words of [128, width], with zeros beside."""
  if width > x.shape[0]:
    x = jnp.concatenate(
        [x, jnp.zeros((width - x.shape[0], LANES), x.dtype)], 0)
  return words(x.T)


def segments_down(to, segments, first=0):
  """Writes segments [1, keys] into [keys, 128]: one to a row."""
  for start in range(0, segments.shape[1], LANES):
    row = segments[:, start:start + LANES]
    to[pl.ds(first + start, LANES)] = jnp.broadcast_to(row, (LANES, LANES)).T


def kept(*shape_and_dtype):
  """Scratch for an array that is kept as words."""
  *shape, dtype = shape_and_dtype
  shape[-2] //= 4 // dtype.itemsize
  return pltpu.VMEM(tuple(shape), jnp.float32 if dtype.itemsize == 4
                    else jnp.int32)


class Names:
  """Takes references off a list, by turns."""

  def __init__(self, refs):
    self.refs = iter(refs)

  def one(self, present=True):
    return next(self.refs) if present else None

  def take(self, count, present=True):
    return [self.one(present) for _ in range(count)]
