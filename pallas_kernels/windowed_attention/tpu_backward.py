"""The backward pass of windowed attention on TPU: which schedule, and its ends.

Up to a window of 257 keys the schedule of tpu_backward_narrow.py, otherwise
that of tpu_backward_wide.py. delta = sum(o do) and the gradient of the sinks,
-sum(exp(sink - lse) delta), are XLA's.
"""
import math

import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.windowed_attention import (
    tpu_backward_narrow, tpu_backward_wide, tpu_blocks)
from pallas_kernels.windowed_attention.tpu_backward_scores import (
    LANES, UNSEEN, Plan)

NARROW = 257  # the widest window of the narrow schedule
WIDE_ROWS = 512  # at most, of the wide: the code of a step grows with them
BLOCKS_BYTES = 16 << 20  # of VMEM for blocks of queries
RING_BYTES = 10 << 20  # and for the sums of the wide schedule


def _gradients(q, k, v, do, lse, delta, segments, options, blocks):
  """Of arrays [B, K, (G,) H, positions], queries and keys at the same."""
  group, head_dim, length = q.shape[2:]
  window = length if options.window is None else min(options.window, length)
  rows = min(blocks.rows, -(-length // LANES) * LANES)
  narrow = window <= NARROW
  halo = LANES if window <= LANES + 1 else 2 * LANES
  if narrow:
    rows = -(-rows // halo) * halo
  else:
    # Blocks of queries, twice, and their sums within a share of VMEM.
    rows = min(rows, WIDE_ROWS)
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
    segments = [padded(x)[:, None] for x in segments]
  args = q, k, v, do, lse, delta, segments, options

  plan = Plan(window, options.scale, options.soft_cap, group, rows, LANES,
               math.gcd(group, blocks.lanes // LANES), blocks.lead, blocks.lag,
               halo, blocks.lanes)
  if narrow:
    sub = LANES // math.gcd(group, LANES // blocks.sub)
    if (segments is None and options.soft_cap is None and options.scale > 0
        and q.dtype == jnp.bfloat16 and head_dim + 2 * sub <= blocks.lanes):
      heads = LANES // sub
      heads *= math.gcd(group // heads, blocks.lanes // LANES)
      plan = plan._replace(sub=sub, heads=heads, mask_by_matmul=True)
    gradients = tpu_backward_narrow.gradients(plan, *args)
  else:
    if plan.lanes < blocks.lanes and rows % blocks.lanes == 0:
      plan = plan._replace(sub=blocks.lanes // plan.heads)
    before = min(-(-(window - 1) // rows), whole // rows - 1)
    plan = plan._replace(before=before)
    ring = 8 * head_dim * rows * (before + 1)
    if ring <= RING_BYTES:
      gradients = tpu_backward_wide.gradients(plan, *args)
    else:
      gradients = (*tpu_backward_wide.gradients(plan, *args, want_k=False),
                   *tpu_backward_wide.gradients(plan, *args, want_q=False))
  return [x[..., :length] for x in gradients]


def backward(q_BNHT, k_BKHS, v_BKHS, sinks_N, segment_ids, o_BNHT, lse_BNT,
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
  def shifted(x, value=0):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1)
                   + [(options.q_offset - first, 0)], constant_values=value)
  def grouped(x, value=0):
    return shifted(x.reshape(batch, num_kv_heads, -1, *x.shape[2:]), value)
  segments = None
  if segment_ids is not None:
    q_segment_BT, k_segment_BS = (x.astype(jnp.int32) for x in segment_ids)
    segments = shifted(q_segment_BT), seen(k_segment_BS)
  dq, dk, dv = _gradients(
      grouped(q_BNHT), seen(k_BKHS), seen(v_BKHS), grouped(do_BNHT),
      grouped(lse_BNT, -UNSEEN), grouped(delta_BNT),
      segments, options, blocks)
  dq = dq[..., options.q_offset - first:].reshape(q_BNHT.shape)
  dk, dv = (jnp.pad(x, [(0, 0)] * 3 + [(first, num_keys - last)])
            for x in (dk, dv))
  dsinks_N = None
  if sinks_N is not None:
    sinks = sinks_N.astype(jnp.float32)[:, None]
    dsinks_N = -jnp.sum(jnp.exp(sinks - lse_BNT) * delta_BNT, (0, 2))
  return dq, dk, dv, dsinks_N
