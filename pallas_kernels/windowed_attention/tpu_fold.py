"""The forward pass of windowed attention on TPU: windows of whole lanes.

A tile is `rows` queries of `heads` query heads, side by side on the lanes. It
reads window + rows keys: the oldest `rows`, of which the first query sees all
but one and the last none; those between, which all see; and the tile's own
`rows`, masked by the complementary triangle. So the oldest and its own are
folded into one: a tile takes the maximum, the exponential and the sum of
exactly `window` scores a query, in one pass, with no rescaling, and none is
wasted. A select before the softmax folds, two after it unfold, and the matmul
with the values is window + rows keys deep.

A grid step holds `queries` positions of all G query heads of a key head, the
keys of as many positions, and those of the window before. In HBM move 4 H + 4
bytes a query and head, and 4 H / G for the keys: at H 64, G 8 and a window of
128, 1024 scores move 2336 B, or 4.3 / 3.0 / 2.5 / 1.4 cycles (v5e, a core of
v5p, v6e, 7x). The MXUs of v5 (four of 128 x 128) have half their depth idle at
H 64, so 1024 scores take them 4 (1 + rows / window) + 2 cycles: there rows of
64 are worth moving lanes for. Those of v6e and 7x (two of 256 x 256) take 2.5
with rows of 128. The VPU does 8 to 10 operations, four a cycle, for each
register of 1024 scores.

A tile is a chain of matmul, softmax and matmul. The compiler keeps the order in
which matmuls are written, so a tile's scores are written `lead` tiles ahead of
its softmax, and its output `lag` tiles behind.

VMEM: q and o, 2 * 2 * G * H * queries values, are the most of it.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms, vma
from pallas_kernels.windowed_attention import tpu_blocks
from pallas_kernels.windowed_attention.tpu_common import (
    LANES, LOG2_E, UNSEEN, by_head, cost, multiply, padded, scaled_KH)


def _pipeline(tiles, scores, softmax, output, lead, lag):
  """Writes the three stages of each tile, later ones that far behind."""
  scored, weighed = {}, {}
  for n in range(len(tiles) + lead + lag):
    if n < len(tiles):
      scored[n] = scores(tiles[n])
    if (m := n - lead) in scored:
      weighed[m] = softmax(tiles[m], scored.pop(m))
    if (m := m - lag) in weighed:
      output(tiles[m], *weighed.pop(m))


def _over_keys(reduce, combine, parts):
  """Parts [keys, lanes] reduced to [1, lanes], over a register's sublanes but
  once."""
  parts = [reduce(x.reshape(-1, 8, x.shape[1]), 0) for x in parts]
  return reduce(functools.reduce(combine, parts), 0, keepdims=True)


def _kernel(q_ref, k_ref, v_ref, k_before_ref, v_before_ref, sinks_ref, o_ref,
            lse_ref, k_KH_ref, v_HK_ref, *, window, scale, blocks):
  group, head_dim, queries = q_ref.shape
  rows, heads = blocks.rows, blocks.heads
  dtype = q_ref.dtype
  k_KH_ref[:window] = scaled_KH(k_before_ref[...], scale * LOG2_E)
  k_KH_ref[window:] = scaled_KH(k_ref[...], scale * LOG2_E)
  v_HK_ref[:, :window] = v_before_ref[...]
  v_HK_ref[:, window:] = v_ref[...]
  # Before the first step's keys there are none.
  absent = jnp.where(pl.program_id(2) == 0, UNSEEN, 0.0)
  iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (rows, LANES))
  own = iota(0) <= iota(1) % rows

  def scores(tile):
    start, head = tile
    q = jnp.concatenate([q_ref[head + a, :, start:start + rows]
                         for a in range(heads)], 1)
    return multiply(k_KH_ref[start:start + window + rows], q)

  def softmax(tile, s):
    """Of one register's width: weights [keys, 128], maximum, denominator."""
    start, head = tile
    before = max(rows, window - start)  # so many keys are of the step before
    oldest = s[:rows] if start >= window else s[:rows] + absent
    here = [jnp.where(own, s[window:], oldest), s[before:window]]
    here = [x for x in here if x.size]
    earlier = [s[rows:before]] if before > rows else []
    sink = jnp.concatenate([sinks_ref[head + a:head + a + 1, :rows]
                            for a in range(LANES // rows)], 1)
    top = jnp.maximum(sink, _over_keys(jnp.max, jnp.maximum, here))
    if earlier:
      top = jnp.maximum(
          top, _over_keys(jnp.max, jnp.maximum, earlier) + absent)
    p_here = [jnp.exp2(x - top) for x in here]
    p_earlier = [jnp.exp2(x - (top - absent)) for x in earlier]
    total = jnp.exp2(sink - top) + _over_keys(jnp.sum, jnp.add,
                                              p_here + p_earlier)
    folded, *between = [p.astype(dtype) for p in (
        p_here[0], *p_earlier, *p_here[1:])]
    none = jnp.zeros_like(folded)
    parts = [jnp.where(own, none, folded), *between,
             jnp.where(own, folded, none)]
    return jnp.concatenate(parts, 0), top, total

  def softmaxes(tile, s):
    start, head = tile
    found = [softmax((start, head + at // rows), s[:, at:at + LANES])
             for at in range(0, heads * rows, LANES)]
    p, top, total = (jnp.concatenate(x, 1) for x in zip(*found))
    # Up to whole lanes of the values.
    left, right = start % LANES, -(start + window + rows) % LANES
    p = jnp.concatenate(
        [jnp.zeros((n, p.shape[1]), dtype) for n in (left,) if n] + [p]
        + [jnp.zeros((n, p.shape[1]), dtype) for n in (right,) if n], 0)
    return p, top, total

  def output(tile, p, top, total):
    start, head = tile
    first = start // LANES * LANES
    o = multiply(v_HK_ref[:, first:first + p.shape[0]], p) * (1 / total)
    lse = (top + jnp.log2(total)) * (1 / LOG2_E)
    for a in range(heads):
      to, of = slice(start, start + rows), slice(a * rows, (a + 1) * rows)
      o_ref[head + a, :, to] = o[:, of].astype(dtype)
      lse_ref[head + a:head + a + 1, to] = lse[:, of]

  _pipeline([(start, head) for start in range(0, queries, rows)
             for head in range(0, group, heads)],
            scores, softmaxes, output, blocks.lead, blocks.lag)


def forward(q_BNHT, k_BKHS, v_BKHS, sinks_N, options, blocks):
  """The output [B, N, H, T] and log of the denominator, float32 [B, N, T]."""
  batch, num_heads, head_dim, num_queries = q_BNHT.shape
  num_kv_heads, group = k_BKHS.shape[1], num_heads // k_BKHS.shape[1]
  queries, window = blocks.queries, options.window
  whole = -(-num_queries // queries) * queries
  q_BKGHT = padded(q_BNHT, whole).reshape(
      batch, num_kv_heads, group, head_dim, whole)
  k_BKHS, v_BKHS = padded(k_BKHS, whole), padded(v_BKHS, whole)
  q_spec = pl.BlockSpec((None, None, group, head_dim, queries),
                        lambda b, k, i: (b, k, 0, 0, i))
  k_spec = pl.BlockSpec((None, None, head_dim, queries),
                        lambda b, k, i: (b, k, 0, i))
  before_spec = pl.BlockSpec(
      (None, None, head_dim, window),
      lambda b, k, i: (b, k, 0, jnp.maximum(i * (queries // window) - 1, 0)))
  o, lse = pl.pallas_call(
      functools.partial(_kernel, window=window, scale=options.scale,
                        blocks=blocks),
      grid=(batch, num_kv_heads, whole // queries),
      in_specs=[q_spec, k_spec, k_spec, before_spec, before_spec,
                pl.BlockSpec((None, group, LANES), lambda b, k, i: (k, 0, 0))],
      out_specs=[q_spec, pl.BlockSpec((None, None, group, queries),
                                      lambda b, k, i: (b, k, 0, i))],
      out_shape=[vma.shape_like(q_BKGHT, q_BKGHT.shape),
                 vma.shape_like(q_BKGHT, (batch, num_kv_heads, group, whole),
                                jnp.float32)],
      scratch_shapes=[pltpu.VMEM((window + queries, head_dim), k_BKHS.dtype),
                      pltpu.VMEM((head_dim, window + queries), k_BKHS.dtype)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",) * 3,
          vmem_limit_bytes=tpu_blocks.vmem_limit(platforms.tpu_generation())),
      cost_estimate=cost(
          batch * num_heads * whole * (window + blocks.rows), 2, head_dim,
          q_BKGHT, k_BKHS, v_BKHS, q_BKGHT),
      interpret=options.interpret, name="windowed_attention_fold",
  )(q_BKGHT, k_BKHS, v_BKHS, k_BKHS, v_BKHS,
    by_head(sinks_N, num_kv_heads, group))
  o = o.reshape(batch, num_heads, head_dim, whole)
  lse = lse.reshape(batch, num_heads, whole)
  return o[..., :num_queries], lse[..., :num_queries]
