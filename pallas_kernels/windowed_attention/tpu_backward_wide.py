"""The TPU backward for a wide window or none, in blocks of keys.

The grid's inner dimension walks the key blocks that a block of queries (with
all G query heads of a key head) reaches, 512 x 512 scores by G heads a step.

- At once: blocks of queries are walked from the last to the first. dQ is
  summed in VMEM over the inner dimension. Of dK and dV a ring of accumulators
  holds the blocks that the window reaches, or all without one, in float32; a
  block of keys is done with the block of queries at its own position and is
  then written. Each pair is computed once: 5 matmuls.
- Apart, where the ring is too large for VMEM (8 * H bytes a key: 8 MB for
  8192 keys of 128): dQ in one pass, dK and dV in another, whose inner
  dimension walks the query blocks that see a block of keys: 7 matmuls.

Masks are computed only in blocks that an edge of the band crosses: how far
keys and queries are apart is known for the block at the same position and for
the last ones that a window reaches, which have code of their own.
"""
import functools

from jax import lax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms, vma
from pallas_kernels.windowed_attention import tpu_blocks
from pallas_kernels.windowed_attention.tpu_backward_scores import (
    LANES, Item, Names, Plan, Step, kept, segments_down, turn)
from pallas_kernels.windowed_attention.tpu_common import cost


def _items(plan: Plan, heads, first_key):
  """Those of a block of queries and the block of keys from first_key on, of up
  to 256 keys each."""
  found = []
  for column in range(plan.rows // plan.column):
    query = column * plan.column
    start = max(first_key, (query - plan.window + 1) // LANES * LANES)
    stop = min(first_key + plan.rows, query + plan.column)
    for start in range(start, stop, 2 * LANES):
      end = min(stop, start + 2 * LANES)
      masked = (end - 1 > query
                or start < query + plan.column - plan.window)
      found.append(Item(column, 0, heads, start, end, masked))
  return found


def _pairs(plan: Plan, count: int) -> int:
  """Of queries and keys that are computed, for each of the query heads."""
  return sum((count - j) * (item.stop - item.start) * plan.column
             for j in range(min(count, plan.before + 1))
             for item in _items(plan, 0, -j * plan.rows))


def _kernel(*refs, plan, has_segments, want_q, want_k):
  names = Names(refs)
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

    def add(ring, item, gradient):
      at = pl.ds(item.start - first_key, item.keys)
      ring[slot, :, at] += gradient

    first_key = -blocks_before * plan.rows
    step = Step(
        plan, k.dtype, first_key, functools.partial(queries, q),
        functools.partial(queries, do),
        lambda item: k[:, pl.ds(item.start - first_key, item.keys)],
        add_dq if want_q else None,
        functools.partial(add, dk_ring) if want_k else None,
        functools.partial(add, dv_ring) if want_k else None, lse, delta, kt,
        vt, segments, key_segments)

    def heads(n, _):
      step.run(_items(plan, n * plan.heads, first_key))
    lax.fori_loop(0, plan.group // plan.heads, heads, None)

  @pl.when(present)
  def _():
    for x, turned in (k, kt), (v, vt):
      for tile in range(plan.rows // LANES):
        part = turn(x[:, pl.ds(tile * LANES, LANES)], turned.shape[1])
        turned[pl.ds(tile * part.shape[0], part.shape[0])] = part
    if has_segments:
      segments_down(key_segments, segments_k[...])

  # Only where an edge of the band passes is a mask needed.
  inside = max(1, plan.window // plan.rows)  # blocks before: 1 to inside - 1
  for blocks_before in (0, *range(inside, plan.before + 1)):
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


def gradients(plan, q, k, v, do, lse, delta, segments, options, want_q=True,
          want_k=True):
  """dq and dk, dv where wanted, of any window, of whole blocks."""
  batch, num_kv_heads, group, head_dim, length = q.shape
  rows, count, steps = plan.rows, length // plan.rows, plan.before + 1
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
    for x, at in zip(segments, (q_at, k_at)):
      args.append(x)
      in_specs.append(pl.BlockSpec(
          (None, 1, rows), lambda b, h, i, j, at=at: (b, 0, at(i, j))))
  out, out_specs = [], []
  scratch = [kept(rows, head_dim, q.dtype)] * 2
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
      functools.partial(_kernel, plan=plan, want_q=want_q, want_k=want_k,
                        has_segments=segments is not None),
      grid=(batch, num_kv_heads, count, steps), in_specs=in_specs,
      out_specs=out_specs, scratch_shapes=scratch,
      out_shape=[vma.shape_like(x, x.shape) for x in out],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary",
                               "arbitrary"),
          vmem_limit_bytes=tpu_blocks.vmem_limit(platforms.tpu_generation())),
      cost_estimate=cost(
          batch * num_kv_heads * group * _pairs(plan, count),
          2 + want_q + 2 * want_k, head_dim, *args, *out),
      interpret=options.interpret, name="windowed_attention_backward")(*args)
