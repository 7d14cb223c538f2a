"""What windowed attention means, in plain jnp, on all T x S scores."""
import functools

import jax.numpy as jnp


def visible(q_positions, k_positions, window):
  """Whether a query sees a key: causal, its last `window` keys if given."""
  distance = q_positions[..., :, None] - k_positions[..., None, :]
  seen = distance >= 0
  return seen if window is None else seen & (distance < window)


def visible_in_cache(q_positions_BT, k_positions_BS, window):
  """Whether a query sees a cached key: [B, T, S].

  Position -1 marks a query that is padding and an empty slot. What the cache
  holds from the place of the row's first query on is a guess that failed.
  """
  padding_BT = q_positions_BT < 0
  first_B = jnp.min(jnp.where(padding_BT, jnp.iinfo(jnp.int32).max,
                              q_positions_BT), 1)
  filled_BS = (k_positions_BS >= 0) & (k_positions_BS < first_B[:, None])
  return visible(q_positions_BT, k_positions_BS, window) & (
      filled_BS[:, None] & ~padding_BT[:, :, None])


def visible_of_own(q_positions_BT, window):
  """Whether a query sees the key of another, or its own: [B, T, T]."""
  return visible(q_positions_BT, q_positions_BT, window) & (
      q_positions_BT >= 0)[:, None]


def softmax(s_BKGTS, seen_BTS, sinks_N):
  """Softmax where `seen_BTS` allows it; zeros for a query that sees nothing.

  A sink is one more logit a head, unscaled, which takes part in the softmax
  and is then dropped.
  """
  s_BKGTS = jnp.where(seen_BTS[:, None, None], s_BKGTS, -jnp.inf)
  top = jnp.max(s_BKGTS, -1, keepdims=True)
  if sinks_N is not None:
    sinks = sinks_N.astype(jnp.float32).reshape(s_BKGTS.shape[1], -1, 1, 1)
    top = jnp.maximum(top, sinks)
  top = jnp.where(jnp.isfinite(top), top, 0)
  p_BKGTS = jnp.exp(s_BKGTS - top)
  total = jnp.sum(p_BKGTS, -1, keepdims=True)
  if sinks_N is not None:
    total += jnp.exp(sinks - top)
  return p_BKGTS / jnp.where(total == 0, 1, total)


def grouped(q_BTNH, num_kv_heads):
  """[B, T, N, H] as [B, K, G, T, H]."""
  batch, length, _, head_dim = q_BTNH.shape
  q_BTKGH = q_BTNH.reshape(batch, length, num_kv_heads, -1, head_dim)
  return jnp.moveaxis(q_BTKGH, 1, 3)


def ungrouped(o_BKGTH):
  """[B, K, G, T, H] as [B, T, N, H]."""
  o_BTKGH = jnp.moveaxis(o_BKGTH, 3, 1)
  batch, length, *_, head_dim = o_BTKGH.shape
  return o_BTKGH.reshape(batch, length, -1, head_dim)


def attend(q_BTNH, k_BSKH, v_BSKH, seen_BTS, *, scale, sinks_N, soft_cap):
  """Softmax attention where `seen_BTS` allows it, in float32."""
  einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  s_BKGTS = scale * einsum("BKGTH,BSKH->BKGTS",
                           grouped(q_BTNH, k_BSKH.shape[2]), k_BSKH)
  if soft_cap is not None:
    s_BKGTS = soft_cap * jnp.tanh(s_BKGTS / soft_cap)
  p_BKGTS = softmax(s_BKGTS, seen_BTS, sinks_N).astype(v_BSKH.dtype)
  return ungrouped(einsum("BKGTS,BSKH->BKGTH", p_BKGTS, v_BSKH)).astype(
      q_BTNH.dtype)


def windowed_attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids,
                       options):
  """See the package's `windowed_attention`."""
  num_queries, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
  q_positions = options.q_offset + jnp.arange(num_queries)
  seen_BTS = visible(q_positions, jnp.arange(num_keys), options.window)[None]
  if segment_ids is not None:
    q_segment_BT, k_segment_BS = segment_ids
    seen_BTS &= q_segment_BT[:, :, None] == k_segment_BS[:, None]
  return attend(q_BTNH, k_BSKH, v_BSKH, seen_BTS, scale=options.scale,
                sinks_N=sinks_N, soft_cap=options.soft_cap)


def cached_attention(q_BTNH, k_BTKH, v_BTKH, k_BSKH, v_BSKH, q_positions_BT,
                     k_positions_BS, sinks_N, options):
  """See the package's `cached_attention`."""
  seen_BTS = jnp.concatenate([
      visible_in_cache(q_positions_BT, k_positions_BS, options.window),
      visible_of_own(q_positions_BT, options.window)], -1)
  k_BSKH = jnp.concatenate([k_BSKH, k_BTKH], 1)
  if v_BSKH is None:
    v_BSKH = k_BSKH[..., :options.v_head_dim]
  else:
    v_BSKH = jnp.concatenate([v_BSKH, v_BTKH], 1)
  return attend(q_BTNH, k_BSKH, v_BSKH, seen_BTS, scale=options.scale,
                sinks_N=sinks_N, soft_cap=options.soft_cap)
