"""Next-token cross-entropy that never stores the logits of all tokens."""
import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxlm.config import ModelConfig
from jaxlm.model.transformer import unembedding
from jaxlm.parallel import mesh
from pallas_kernels import vma

# Logits held at a time; large enough for matmuls at full speed.
CHUNK_LOGITS = 1 << 24


def next_token_loss(config: ModelConfig, params: dict, hidden_BTD, targets_BT,
                    mask_BT, z_loss: float = 0.0, fsdp: bool = True):
  """The summed loss of the targets under the mask, and their number.

  Args:
    hidden_BTD: what `forward` returns.
    targets_BT: int32, the token that follows each position.
    mask_BT: bool or float, which targets count.
    z_loss: weight of logsumexp(logits)^2 (PaLM, section 5).
    fsdp: how the parameters are split, as in `Execution`.

  Returns:
    Nats and count, float32 scalars. The gradient is computed together with
    the loss, chunk by chunk, so logits are multiplied out once.
  """
  mask_BT = mask_BT.astype(jnp.float32)
  options = Options(config.final_soft_cap, z_loss, fsdp)
  total = _on_devices(_cross_entropy, options, True, hidden_BTD,
                      unembedding(config, params), targets_BT, mask_BT)
  return total, jnp.sum(mask_BT)


def token_losses(config: ModelConfig, params: dict, hidden_BTD, targets_BT,
                 mask_BT, fsdp: bool = True):
  """Nats of each target, float32 [B, T], 0 outside the mask.

  For evaluation, and at no more cost than `next_token_loss`, whose arguments
  these are; gradients are that one's to give.
  """
  options = Options(config.final_soft_cap, 0.0, fsdp)
  return _on_devices(_token_losses, options, False, hidden_BTD,
                     unembedding(config, params), targets_BT,
                     mask_BT.astype(jnp.float32))


class Options(typing.NamedTuple):
  """Static. fsdp: of the table each device has some columns of the embedding's
  width. vocab: the axes of the mesh that split the vocabulary."""
  soft_cap: float | None
  z_loss: float
  fsdp: bool
  vocab: tuple[str, ...] = ()


def _on_devices(loss, options, summed: bool, hidden_BTD, table_DV, *of_tokens):
  """`loss` of all tokens, a sum or [B, T]: each device's own tokens over its
  part of the vocabulary."""
  def local(options, hidden_BTD, table_DV, *of_tokens):
    found = loss(options, hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
                 table_DV, *(x.reshape(-1) for x in of_tokens))
    return found if summed else found.reshape(hidden_BTD.shape[:2])

  table_DV = table_DV.astype(hidden_BTD.dtype)
  if mesh.current() is None:
    return local(options, hidden_BTD, table_DV, *of_tokens)
  axes = mesh.rules(options.fsdp)
  batch = (*axes["batch"], *axes["length"])
  # By no axis that splits the tokens, as it is where weights are resident.
  vocab = tuple(name for name in axes["vocab"] if name not in batch)

  def sharded(hidden_BTD, table_DV, *of_tokens):
    # Summed over the devices here, these gradients are: the last to be.
    hidden_BTD, table_DV = vma.vary((hidden_BTD, table_DV), (*batch, *vocab))
    found = local(options._replace(vocab=vocab), hidden_BTD, table_DV,
                  *of_tokens)
    return lax.psum(found, batch) if summed else found

  table = mesh.spec("embed", None, fsdp=options.fsdp)
  tokens = "batch", "length"
  tokens_BT = mesh.spec(*tokens)
  return mesh.manual(
      sharded, (mesh.spec(*tokens, None), P(*table[:1], vocab), tokens_BT,
                tokens_BT), P() if summed else tokens_BT)(
                    hidden_BTD, table_DV, *of_tokens)


def _chunk_loss(options, hidden_TD, table_DV, targets_T, mask_T):
  """The losses of a few tokens, and their gradient's factor of the logits."""
  cap, z_loss, _, axes = options
  logits_TV = jnp.dot(hidden_TD, table_DV, preferred_element_type=jnp.float32)
  slope = 1.0
  if cap is not None:
    tanh = jnp.tanh(logits_TV / cap)
    logits_TV, slope = cap * tanh, 1 - tanh ** 2
  top_T = _all(lax.pmax, jnp.max(logits_TV, -1), axes)
  exp_TV = jnp.exp(logits_TV - top_T[:, None])
  sum_T = _all(lax.psum, jnp.sum(exp_TV, -1), axes)
  lse_T = top_T + jnp.log(sum_T)
  words = table_DV.shape[1]
  if axes:
    targets_T -= lax.axis_index(axes) * words
  hit_TV = jnp.arange(words) == targets_T[:, None]
  if axes:
    target_T = lax.psum(jnp.sum(jnp.where(hit_TV, logits_TV, 0), -1), axes)
  else:
    target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], -1)[:, 0]
  loss_T = mask_T * (lse_T - target_T + z_loss * lse_T ** 2)
  scale_T = mask_T * (1 + 2 * z_loss * lse_T) / sum_T
  dlogits_TV = slope * (exp_TV * scale_T[:, None]
                        - jnp.where(hit_TV, mask_T[:, None], 0))
  return loss_T, dlogits_TV.astype(hidden_TD.dtype)


def _all(reduce, x, axes):
  return reduce(x, axes) if axes else x


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


def _whole(options, table_DV):
  """The table's whole width, of the columns that this device has."""
  if mesh.current() is None:
    return table_DV
  return mesh.gather(table_DV, 0, "embed", options.fsdp)


def _token_losses(options, hidden_TD, table_DV, targets_T, mask_T):
  table_DV = _whole(options, table_DV)

  def body(_, xs):
    hidden, targets, mask = xs
    return None, _chunk_loss(options, hidden, table_DV, targets, mask)[0]

  _, losses_T = _over_chunks(body, None, (hidden_TD, targets_T, mask_T),
                             table_DV.shape[1])
  return losses_T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, hidden_TD, table_DV, targets_T, mask_T):
  return jnp.sum(_token_losses(options, hidden_TD, table_DV, targets_T, mask_T))


def _zero(x, shape=()):
  """Zeros that may differ between devices as x does."""
  return vma.zeros(shape, jnp.float32, x)


def _forward(options, hidden_TD, table_DV, targets_T, mask_T):
  table_DV, scatter = jax.vjp(functools.partial(_whole, options), table_DV)

  def body(carry, xs):
    total, dtable_DV = carry
    hidden, targets, mask = xs
    loss_T, dlogits = _chunk_loss(options, hidden, table_DV, targets, mask)
    dhidden = jnp.dot(dlogits, table_DV.T)
    dtable_DV += jnp.dot(hidden.T, dlogits,
                         preferred_element_type=jnp.float32)
    return (total + jnp.sum(loss_T), dtable_DV), dhidden

  carry = _zero(mask_T), _zero(table_DV, table_DV.shape)
  (total, dtable_DV), dhidden_TD = _over_chunks(
      body, carry, (hidden_TD, targets_T, mask_T), table_DV.shape[1])
  gradients = dhidden_TD, *scatter(dtable_DV.astype(table_DV.dtype))
  # The layers' gradients, which need the first, are made after the second has
  # gone to those who have the table: all of it in float32 would wait for them.
  return total, lax.optimization_barrier(gradients)


def _backward(options, gradients, scale):
  dhidden_TD, dtable_DV = gradients
  return ((scale * dhidden_TD).astype(dhidden_TD.dtype),
          (scale * dtable_DV).astype(dtable_DV.dtype), None, None)


_cross_entropy.defvjp(_forward, _backward)
