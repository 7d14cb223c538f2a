"""What windowed attention means, in plain jnp, on all T x S scores."""
import jax.numpy as jnp


def visible(q_positions, k_positions, window):
  """Whether a query sees a key: causal, its last `window` keys if given."""
  distance = q_positions[..., :, None] - k_positions[..., None, :]
  seen = distance >= 0
  return seen if window is None else seen & (distance < window)


def attend(q_BTNH, k_BSKH, v_BSKH, seen_BTS, *, scale, sinks_N=None,
           soft_cap=None):
  """Softmax attention where `seen_BTS` allows it, in float32.

  A sink is one more logit a head, unscaled, which takes part in the softmax
  and is then dropped. A query that sees nothing gives zero.
  """
  *_, num_heads, head_dim = q_BTNH.shape
  batch, _, num_kv_heads, _ = k_BSKH.shape
  q_BTKGH = q_BTNH.reshape(batch, -1, num_kv_heads,
                           num_heads // num_kv_heads, head_dim)
  s_BKGTS = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH,
                               preferred_element_type=jnp.float32)
  if soft_cap is not None:
    s_BKGTS = soft_cap * jnp.tanh(s_BKGTS / soft_cap)
  seen = seen_BTS[:, None, None]
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
  o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS.astype(v_BSKH.dtype),
                       v_BSKH, preferred_element_type=jnp.float32)
  return o_BTKGH.reshape(*q_BTNH.shape[:3], -1).astype(q_BTNH.dtype)


def windowed_attention(q_BTNH, k_BSKH, v_BSKH, *, window, scale, sinks_N=None,
                       soft_cap=None, segment_ids_BS=None, q_offset=0):
  """See the package's `windowed_attention`."""
  num_queries, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
  q_positions = q_offset + jnp.arange(num_queries)
  seen_BTS = visible(q_positions, jnp.arange(num_keys), window)[None]
  if segment_ids_BS is not None:
    q_segment_BT = segment_ids_BS[:, q_offset:q_offset + num_queries]
    seen_BTS &= q_segment_BT[:, :, None] == segment_ids_BS[:, None]
  return attend(q_BTNH, k_BSKH, v_BSKH, seen_BTS, scale=scale,
                sinks_N=sinks_N, soft_cap=soft_cap)
