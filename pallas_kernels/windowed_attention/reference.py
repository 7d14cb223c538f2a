"""What windowed attention means, in plain jnp, on all T x S scores."""
import functools

import jax.numpy as jnp


def visible(q_positions, k_positions, window):
  """Whether a query sees a key: causal, its last `window` keys if given."""
  distance = q_positions[..., :, None] - k_positions[..., None, :]
  seen = distance >= 0
  return seen if window is None else seen & (distance < window)


def attend(q_BTNH, k_BKHS, v_BKSH, seen_BTS, *, scale, sinks_N=None,
           soft_cap=None, own=None):
  """Softmax attention where `seen_BTS` allows it, in float32.

  `own`, if given, are the queries' own keys and values [B, T, K, H], which
  stand at none of the S places; each query sees its own.

  A sink is one more logit a head, unscaled, which takes part in the softmax
  and is then dropped. A query that sees nothing gives zero.
  """
  *_, num_heads, head_dim = q_BTNH.shape
  batch, num_kv_heads, _, _ = k_BKHS.shape
  # The queries are moved, which are few in decoding, not the keys.
  q_BKGTH = jnp.moveaxis(q_BTNH.reshape(
      batch, -1, num_kv_heads, num_heads // num_kv_heads, head_dim), 1, 3)
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  s_BKGTS = scale * einsum("BKGTH,BKHS->BKGTS", q_BKGTH, k_BKHS)
  seen = seen_BTS[:, None, None]
  if own is not None:
    own_BKGT = scale * einsum("BKGTH,BTKH->BKGT", q_BKGTH, own[0])
    s_BKGTS = jnp.concatenate([s_BKGTS, own_BKGT[..., None]], -1)
    seen = jnp.pad(seen, [(0, 0)] * 4 + [(0, 1)], constant_values=True)
  if soft_cap is not None:
    s_BKGTS = soft_cap * jnp.tanh(s_BKGTS / soft_cap)
  s_BKGTS = jnp.where(seen, s_BKGTS, -jnp.inf)
  top = jnp.max(s_BKGTS, -1, keepdims=True)
  if sinks_N is not None:
    sinks = sinks_N.astype(jnp.float32).reshape(num_kv_heads, -1, 1, 1)
    top = jnp.maximum(top, sinks)
  top = jnp.where(jnp.isfinite(top), top, 0)
  p_BKGTS = jnp.exp(s_BKGTS - top)
  total = jnp.sum(p_BKGTS, -1, keepdims=True)
  if sinks_N is not None:
    total += jnp.exp(sinks - top)
  p_BKGTS /= jnp.where(total == 0, 1, total)
  p_BKGTS = p_BKGTS.astype(v_BKSH.dtype)
  o_BKGTH = einsum("BKGTS,BKSH->BKGTH", p_BKGTS[..., :v_BKSH.shape[2]], v_BKSH)
  if own is not None:
    o_BKGTH += einsum("BKGT,BTKH->BKGTH", p_BKGTS[..., -1], own[1])
  return jnp.moveaxis(o_BKGTH, 3, 1).reshape(
      *q_BTNH.shape[:3], -1).astype(q_BTNH.dtype)


def windowed_attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BS,
                       options):
  """See the package's `windowed_attention`."""
  num_queries, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
  q_offset = options.q_offset
  q_positions = q_offset + jnp.arange(num_queries)
  seen_BTS = visible(q_positions, jnp.arange(num_keys), options.window)[None]
  if segment_ids_BS is not None:
    q_segment_BT = segment_ids_BS[:, q_offset:q_offset + num_queries]
    seen_BTS &= q_segment_BT[:, :, None] == segment_ids_BS[:, None]
  return attend(q_BTNH, k_BSKH.transpose(0, 2, 3, 1),
                v_BSKH.transpose(0, 2, 1, 3), seen_BTS, scale=options.scale,
                sinks_N=sinks_N, soft_cap=options.soft_cap)
