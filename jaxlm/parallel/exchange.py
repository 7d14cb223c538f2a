"""How rows travel between the devices of one axis of the mesh, and back.

Each source, a device of the axis, has M rows sorted by expert, the experts of
each destination next to each other. All know how many rows every source has
for every expert (`counts_SE`): who sends what where follows from that, without
asking. Rows arrive sorted by expert, and by source within.

Shapes: S sources, E experts, L experts of one destination.
"""
import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platforms, vma

AXIS = "expert"


def starts(sizes, axis: int = -1):
  """Where each part begins when they stand one after the other."""
  return jnp.cumsum(sizes, axis) - sizes


def relocate(index_N, from_K, to_K, size_K, missing: int):
  """Where indices go when part k, `size_K[k]` of them from `from_K[k]` on,
  moves to `to_K[k]`; `missing` for those in no part."""
  from_K, to_K, size_K = (x.reshape(-1) for x in (from_K, to_K, size_K))
  offset_NK = index_N[:, None] - from_K
  inside_NK = (offset_NK >= 0) & (offset_NK < size_K)
  moved_N = index_N + jnp.sum(jnp.where(inside_NK, to_K - from_K, 0), 1)
  return jnp.where(jnp.any(inside_NK, 1), moved_N, missing)


@jax.custom_vjp
def take(x, index_N, inverse_M):
  """Rows of x, zeros where the index is past its end. The inverse says where
  each of them went, so that the gradient takes too."""
  return x.at[index_N].get(mode="fill", fill_value=0)


take.defvjp(lambda x, index_N, inverse_M: (take(x, index_N, inverse_M),
                                           (index_N, inverse_M)),
            lambda indices, dy: (take(dy, *indices[::-1]), None, None))


class Parts(typing.NamedTuple):
  """Parts of the rows, for each source and expert: the first row, where it
  goes, and how many there are."""
  first_SE: jax.Array
  place_SE: jax.Array
  size_SE: jax.Array

  def of_shard(self, shard, shards: int):
    """Those for the experts of one destination."""
    local = self.size_SE.shape[1] // shards
    return Parts(*(lax.dynamic_slice_in_dim(x_SE, shard * local, local, 1)
                   for x_SE in self))


def in_line(counts_SE, shards: int) -> Parts:
  """All rows; they go to a line of each destination, without end."""
  sources, num_experts = counts_SE.shape
  counts_DR = counts_SE.T.reshape(shards, -1)
  place_SE = starts(counts_DR).reshape(num_experts, sources).T
  return Parts(starts(counts_SE), place_SE, counts_SE)


def in_blocks(counts_SE, shards: int) -> Parts:
  """All rows; of each source and destination they go to a block, of a size
  without end."""
  first_SE = starts(counts_SE)
  counts_SDL = counts_SE.reshape(len(counts_SE), shards, -1)
  return Parts(first_SE, starts(counts_SDL).reshape(counts_SE.shape),
               counts_SE)


def in_capacity(counts_SE, capacity: int, shards: int) -> Parts:
  """At most so many rows for each expert, in a block with room for them."""
  expert_E = jnp.arange(counts_SE.shape[1]) % (counts_SE.shape[1] // shards)
  return Parts(starts(counts_SE),
               jnp.broadcast_to(expert_E * capacity, counts_SE.shape),
               jnp.minimum(counts_SE, capacity))


def window(parts: Parts, start, size: int) -> Parts:
  """What goes to `start` and the `size` - 1 places after it."""
  low = jnp.clip(start - parts.place_SE, 0, parts.size_SE)
  high = jnp.clip(start + size - parts.place_SE, 0, parts.size_SE)
  return Parts(parts.first_SE + low, parts.place_SE + low - start, high - low)


def by_slots(parts: Parts, slots: int):
  """Exchange in blocks of so many slots, full or not: the parts' places.

  Returns:
    there: rows of one source [M, D] and their weights [M] to rows sorted by
      expert and theirs.
    back: these rows to where they were, zeros for rows that did not go.
    sizes_L: rows of each of this shard's experts that come.
  """
  shards, me = lax.axis_size(AXIS), lax.axis_index(AXIS)
  shard_E = jnp.arange(parts.size_SE.shape[1]) // (
      parts.size_SE.shape[1] // shards)
  first, place, size = (x_SE[me] for x_SE in parts)
  place += shard_E * slots
  arrived = parts.of_shard(me, shards)
  place_SL = arrived.place_SE + jnp.arange(shards)[:, None] * slots
  sizes_LS = arrived.size_SE.T
  line_LS = starts(sizes_LS.reshape(-1)).reshape(sizes_LS.shape)
  total = shards * slots
  slot_N, none = jnp.arange(total), total
  line_slot_N = relocate(slot_N, line_LS, place_SL.T, sizes_LS, none)
  slot_line_N = relocate(slot_N, place_SL.T, line_LS, sizes_LS, none)

  def rows_and_slots(num_rows: int):
    return (relocate(slot_N, place, first, size, num_rows),
            relocate(jnp.arange(num_rows), first, place, size, none))

  def exchange(x):
    return lax.all_to_all(x, AXIS, 0, 0, tiled=True)

  def there(x_MD, weight_M):
    taken = rows_and_slots(len(x_MD))
    return tuple(take(exchange(take(x, *taken)), line_slot_N, slot_line_N)
                 for x in (x_MD, weight_M))

  def back(y, num_rows: int):
    slot_row_N, row_slot_M = rows_and_slots(num_rows)
    return take(exchange(take(y, slot_line_N, line_slot_N)), row_slot_M,
                slot_row_N)

  return there, back, jnp.sum(sizes_LS, 1)


class Trip(typing.NamedTuple):
  """Slices of rows that each device sends, and that come to it; the same
  number for every peer. sent_to: where at the receiver. came_from: where at
  the sender."""
  sent_from: jax.Array
  sent_to: jax.Array
  sent: jax.Array
  came_from: jax.Array
  came_to: jax.Array
  came: jax.Array

  def back(self):
    return Trip(sent_from=self.came_to, sent_to=self.came_from, sent=self.came,
                came_from=self.sent_to, came_to=self.sent_from, came=self.sent)


def by_slices(parts: Parts, size: int):
  """Exchange of the parts alone, which go to `size` places of a line. Returns
  what `by_slots` does."""
  shards, me = lax.axis_size(AXIS), lax.axis_index(AXIS)
  arrived = parts.of_shard(me, shards)
  trip = Trip(*(x_SE[me] for x_SE in parts),
              *(x_SL.reshape(-1) for x_SL in arrived))
  return (lambda x_MD, weight_M: travel((x_MD, weight_M), trip, size),
          lambda y_RD, num_rows: travel((y_RD,), trip.back(), num_rows)[0],
          jnp.sum(arrived.size_SE, 0))


def travel(rows, trip: Trip, num_rows: int):
  """Slices of rows (x_MD, weight_M) or (x_MD,) where they go; zeros
  elsewhere. [num_rows, ...]"""
  return _travel(len(rows[0]), num_rows, *vma.like((rows, trip)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _travel(rows_before: int, num_rows: int, rows, trip):
  dim = rows[0].shape[1]
  x = platforms.on_accelerator(
      functools.partial(_ragged_all_to_all, num_rows),
      functools.partial(_all_gathered, num_rows), _packed(*rows), trip)
  return (x,) if len(rows) == 1 else (x[:, :dim], _unpacked(x[:, dim:]))


def _travel_backward(rows_before: int, num_rows: int, trip, dy):
  return _travel(num_rows, rows_before, dy, trip.back()), None


_travel.defvjp(lambda rows_before, num_rows, rows, trip: (
    _travel(rows_before, num_rows, rows, trip), trip), _travel_backward)


def _packed(x_MD, weight_M=None):
  """Rows and weights as one: sent alone, a weight would take the room of 128
  (as a TPU lays out arrays), while rows are mostly padded anyway. In a dtype
  of 8 bits for the fraction a weight is a sum of three, and exact."""
  if weight_M is None:
    return x_MD
  parts, dtype = [], x_MD.dtype
  rest_M = weight_M.astype(jnp.float32)
  for _ in range(1 if dtype == jnp.float32 else 3):
    part_M = rest_M.astype(dtype)
    parts.append(part_M)
    info = jnp.finfo(dtype)
    # What was rounded to the dtype, as no compiler may leave out.
    rest_M -= lax.reduce_precision(rest_M, info.nexp, info.nmant)
  return jnp.concatenate([x_MD, jnp.stack(parts, 1)], 1)


def _unpacked(parts_MP):
  return jnp.sum(parts_MP.astype(jnp.float32), 1)


def _ragged_all_to_all(num_rows: int, x, trip: Trip):
  zeros = vma.like(jnp.zeros((num_rows, *x.shape[1:]), x.dtype), x)
  return lax.ragged_all_to_all(x, zeros, trip.sent_from, trip.sent,
                               trip.sent_to, trip.came, axis_name=AXIS)


def _all_gathered(num_rows: int, x, trip: Trip):
  """The same where there is no such operation: everyone gets all."""
  shards = lax.axis_size(AXIS)
  source_K = jnp.arange(len(trip.came)) // (len(trip.came) // shards)
  index_N = relocate(jnp.arange(num_rows), trip.came_to,
                     source_K * len(x) + trip.came_from, trip.came,
                     missing=len(x) * shards)
  return lax.all_gather(x, AXIS, tiled=True).at[index_N].get(
      mode="fill", fill_value=0)
