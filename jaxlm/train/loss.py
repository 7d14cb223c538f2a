"""Next-token cross-entropy that never stores the logits of all tokens."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.config import ModelConfig
from jaxlm.model.transformer import unembedding

# Logits held at a time; large enough for matmuls at full speed.
CHUNK_LOGITS = 1 << 24


def next_token_loss(config: ModelConfig, params: dict, hidden_BTD, targets_BT,
                    mask_BT, z_loss: float = 0.0):
  """The summed loss of the targets under the mask, and their number.

  Args:
    hidden_BTD: what `forward` returns.
    targets_BT: int32, the token that follows each position.
    mask_BT: bool or float, which targets count.
    z_loss: weight of logsumexp(logits)^2 (PaLM, section 5).

  Returns:
    Nats and count, float32 scalars. The gradient is computed together with
    the loss, chunk by chunk, so logits are multiplied out once.
  """
  d_model = hidden_BTD.shape[-1]
  table_DV = unembedding(config, params).astype(hidden_BTD.dtype)
  mask_T = mask_BT.reshape(-1).astype(jnp.float32)
  total = _cross_entropy((config.final_soft_cap, z_loss),
                         hidden_BTD.reshape(-1, d_model), table_DV,
                         targets_BT.reshape(-1), mask_T)
  return total, jnp.sum(mask_T)


def _chunk_loss(options, hidden_TD, table_DV, targets_T, mask_T):
  """The loss of a few tokens, and its gradient's factor of the logits."""
  cap, z_loss = options
  logits_TV = jnp.dot(hidden_TD, table_DV, preferred_element_type=jnp.float32)
  slope = 1.0
  if cap is not None:
    tanh = jnp.tanh(logits_TV / cap)
    logits_TV, slope = cap * tanh, 1 - tanh ** 2
  top_T = jnp.max(logits_TV, -1)
  exp_TV = jnp.exp(logits_TV - top_T[:, None])
  sum_T = jnp.sum(exp_TV, -1)
  lse_T = top_T + jnp.log(sum_T)
  target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], -1)[:, 0]
  loss = jnp.sum(mask_T * (lse_T - target_T + z_loss * lse_T ** 2))
  hit_TV = jnp.arange(table_DV.shape[1]) == targets_T[:, None]
  scale_T = mask_T * (1 + 2 * z_loss * lse_T) / sum_T
  dlogits_TV = slope * (exp_TV * scale_T[:, None]
                        - jnp.where(hit_TV, mask_T[:, None], 0))
  return loss, dlogits_TV.astype(hidden_TD.dtype)


def _chunks(num_tokens: int, vocab_size: int) -> list[tuple[int, int, int]]:
  """(start, chunks, rows of each): equal chunks and what is left."""
  rows = min(num_tokens, max(1, CHUNK_LOGITS // vocab_size))
  whole = num_tokens // rows
  spans = [(0, whole, rows)]
  if num_tokens % rows:
    spans.append((whole * rows, 1, num_tokens - whole * rows))
  return spans


def _over_chunks(body, carry, arrays, vocab_size: int):
  """Scans `body` over chunks of tokens; outputs in the tokens' order."""
  outputs = []
  for start, count, rows in _chunks(arrays[0].shape[0], vocab_size):
    xs = [a[start:start + count * rows].reshape(count, rows, *a.shape[1:])
          for a in arrays]
    carry, ys = lax.scan(body, carry, xs)
    outputs.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
  return carry, jax.tree.map(lambda *y: jnp.concatenate(y), *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, hidden_TD, table_DV, targets_T, mask_T):
  def body(total, xs):
    hidden, targets, mask = xs
    loss, _ = _chunk_loss(options, hidden, table_DV, targets, mask)
    return total + loss, None

  total, _ = _over_chunks(body, jnp.float32(0), (hidden_TD, targets_T, mask_T),
                          table_DV.shape[1])
  return total


def _forward(options, hidden_TD, table_DV, targets_T, mask_T):
  def body(carry, xs):
    total, dtable_DV = carry
    hidden, targets, mask = xs
    loss, dlogits = _chunk_loss(options, hidden, table_DV, targets, mask)
    dhidden = jnp.dot(dlogits, table_DV.T)
    dtable_DV += jnp.dot(hidden.T, dlogits,
                         preferred_element_type=jnp.float32)
    return (total + loss, dtable_DV), dhidden

  carry = jnp.float32(0), jnp.zeros(table_DV.shape, jnp.float32)
  (total, dtable_DV), dhidden_TD = _over_chunks(
      body, carry, (hidden_TD, targets_T, mask_T), table_DV.shape[1])
  return total, (dhidden_TD, dtable_DV.astype(table_DV.dtype))


def _backward(options, gradients, scale):
  dhidden_TD, dtable_DV = gradients
  return ((scale * dhidden_TD).astype(dhidden_TD.dtype),
          (scale * dtable_DV).astype(dtable_DV.dtype), None, None)


_cross_entropy.defvjp(_forward, _backward)
