"""The forward pass of windowed attention on TPU: any window, a running softmax.

Scores lie transposed, [keys, queries]: maxima and sums over the keys are then
elementwise over registers, and a query's statistics are one lane. The grid
walks, for each key head, the (query block, key block) pairs that the band
touches and no others; they are listed when traced and prefetched as scalars.
Only pairs that a mask's edge crosses, or all with segments, pay for a mask.

All G query heads of a key head are done in one step: k and v are read once for
them, transposed and scaled once for them (by scale * log2 e, so that scores
need no multiplication and exp is exp2). Of 512 queries and 512 keys, with G 8,
H 64 and bfloat16, a step moves 8 * 64 * 512 * 2 * 2 B of q and o once for all
its keys and 128 KiB of k and v, and computes 2 M scores: 8 matmuls of
[512, 64] x [64, 512] and of [64, 512] x [512, 512]. In VMEM are the blocks
twice (2.3 MiB) and the accumulator (1 MiB).

Where the window is a whole number of lanes, tpu_fold.py does better.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import numpy as np

from pallas_kernels import platforms, vma
from pallas_kernels.windowed_attention import tpu_blocks
from pallas_kernels.windowed_attention.tpu_common import (
    LANES, LOG2_E, UNSEEN, by_head, cost, multiply, padded, scaled_KH)


def pairs(num_queries, queries, keys, options):
  """The blocks of queries and of keys that meet in the band, in order."""
  found = []
  for i in range(num_queries // queries):
    position = options.q_offset + i * queries
    first = 0 if options.window is None else max(
        0, position - options.window + 1) // keys
    found += [(i, j) for j in range(first, (position + queries - 1) // keys
                                    + 1)]
  return np.array(found, np.int32).T


def _kernel(i_ref, j_ref, q_ref, k_ref, v_ref, sinks_ref, *refs, options,
            has_segments):
  *segment_refs, o_ref, lse_ref, acc_ref, m_ref, l_ref = refs
  group, head_dim, queries = q_ref.shape
  keys = k_ref.shape[1]
  n = pl.program_id(2)
  i, j = i_ref[n], j_ref[n]
  first = (n == 0) | (i_ref[jnp.maximum(n - 1, 0)] != i)
  last = n == pl.num_programs(2) - 1
  last |= i_ref[jnp.minimum(n + 1, pl.num_programs(2) - 1)] != i

  @pl.when(first)
  def _():
    m_ref[...] = jnp.broadcast_to(sinks_ref[:, :1], m_ref.shape)
    l_ref[...] = jnp.where(m_ref[...] > UNSEEN, 1.0, 0.0)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  # How far the block's first query stands behind its first key.
  distance = options.q_offset + i * queries - j * keys
  cap = options.soft_cap
  scale = options.scale * LOG2_E if cap is None else options.scale / cap
  k_KH = scaled_KH(k_ref[...], scale)

  def seen(start, width):
    """Which keys [keys, 1] the queries [1, width] from `start` on see."""
    behind = distance + start + (
        jax.lax.broadcasted_iota(jnp.int32, (keys, width), 1)
        - jax.lax.broadcasted_iota(jnp.int32, (keys, width), 0))
    result = behind >= 0
    if options.window is not None:
      result &= behind < options.window
    if has_segments:
      q_segment_ref, k_segment_ref = segment_refs
      k_segment = jnp.broadcast_to(k_segment_ref[...], (LANES, keys)).T
      result &= jnp.tile(k_segment, (1, width // LANES)) == (
          q_segment_ref[:, start:start + width])
    return result

  def compute(masked):
    width = LANES if queries % 256 else 256
    for start in range(0, queries, width):
      at = slice(start, start + width)
      mask = seen(start, width) if masked else None
      for g in range(group):
        s = multiply(k_KH, q_ref[g, :, at])
        if cap is not None:
          s = cap * LOG2_E * jnp.tanh(s)
        if masked:
          s = jnp.where(mask, s, UNSEEN)
        m_old = m_ref[g:g + 1, at]
        m = jnp.maximum(m_old, jnp.max(s, 0, keepdims=True))
        p = jnp.exp2(s - m)
        fade = jnp.exp2(m_old - m)
        m_ref[g:g + 1, at] = m
        l_ref[g:g + 1, at] = l_ref[g:g + 1, at] * fade + jnp.sum(
            p, 0, keepdims=True)
        acc_ref[g, :, at] = acc_ref[g, :, at] * fade + multiply(
            v_ref[...], p.astype(v_ref.dtype))

  if has_segments:
    compute(True)
  else:
    edge = distance < keys - 1
    if options.window is not None:
      edge |= distance + queries > options.window
    pl.when(edge)(lambda: compute(True))
    pl.when(jnp.logical_not(edge))(lambda: compute(False))

  @pl.when(last)
  def _():
    l = l_ref[...]
    lse_ref[...] = (m_ref[...] + jnp.log2(l)) / LOG2_E
    for g in range(group):
      o_ref[g] = (acc_ref[g] / l[g:g + 1]).astype(o_ref.dtype)


def _running(q_BKGHT, k_BKHS, v_BKHS, sinks_N, segment_ids, options,
             blocks):
  """Output and log of the denominator, of whole blocks."""
  batch, num_kv_heads, group, head_dim, num_queries = q_BKGHT.shape
  queries, keys = blocks.queries, blocks.keys
  i, j = pairs(num_queries, queries, keys, options)
  q_spec = pl.BlockSpec((None, None, group, head_dim, queries),
                        lambda b, k, n, i, j: (b, k, 0, 0, i[n]))
  k_spec = pl.BlockSpec((None, None, head_dim, keys),
                        lambda b, k, n, i, j: (b, k, 0, j[n]))
  row_spec = pl.BlockSpec((None, None, group, queries),
                          lambda b, k, n, i, j: (b, k, 0, i[n]))
  in_specs = [q_spec, k_spec, k_spec,
              pl.BlockSpec((None, group, LANES),
                           lambda b, k, n, i, j: (k, 0, 0))]
  args = [q_BKGHT, k_BKHS, v_BKHS, by_head(sinks_N, num_kv_heads, group)]
  if segment_ids is not None:
    for axis, (x, size) in enumerate(zip(segment_ids, (queries, keys))):
      in_specs.append(pl.BlockSpec(
          (None, 1, size), lambda b, k, n, *ij, axis=axis: (b, 0, ij[axis][n])))
      args.append(x[:, None].astype(jnp.int32))
  state = pltpu.VMEM((group, queries), jnp.float32)
  return pl.pallas_call(
      functools.partial(_kernel, options=options,
                        has_segments=segment_ids is not None),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(batch, num_kv_heads, len(i)),
          in_specs=in_specs, out_specs=[q_spec, row_spec],
          scratch_shapes=[pltpu.VMEM((group, head_dim, queries), jnp.float32),
                          state, state]),
      out_shape=[vma.shape_like(q_BKGHT, q_BKGHT.shape),
                 vma.shape_like(q_BKGHT, (batch, num_kv_heads, group,
                                          num_queries), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary"),
          vmem_limit_bytes=tpu_blocks.vmem_limit(platforms.tpu_generation())),
      cost_estimate=cost(batch * num_kv_heads * group * len(i) * queries * keys,
                         2, head_dim, *args, q_BKGHT),
      interpret=options.interpret, name="windowed_attention_running",
  )(i, j, *args)


def forward(q_BNHT, k_BKHS, v_BKHS, sinks_N, segment_ids, options, blocks):
  """The output [B, N, H, T] and log of the denominator, float32 [B, N, T]."""
  batch, num_heads, head_dim, num_queries = q_BNHT.shape
  num_kv_heads, num_keys = k_BKHS.shape[1], k_BKHS.shape[3]
  whole = -(-num_queries // blocks.queries) * blocks.queries
  whole_keys = max(num_keys, options.q_offset + whole)
  whole_keys = -(-whole_keys // blocks.keys) * blocks.keys
  q_BKGHT = padded(q_BNHT, whole).reshape(
      batch, num_kv_heads, -1, head_dim, whole)
  if segment_ids is not None:
    segment_ids = [padded(x, length)
                   for x, length in zip(segment_ids, (whole, whole_keys))]
  o, lse = _running(q_BKGHT, padded(k_BKHS, whole_keys),
                    padded(v_BKHS, whole_keys), sinks_N, segment_ids,
                    options, blocks)
  o = o.reshape(*q_BNHT.shape[:3], whole)
  lse = lse.reshape(batch, num_heads, whole)
  return o[..., :num_queries], lse[..., :num_queries]
