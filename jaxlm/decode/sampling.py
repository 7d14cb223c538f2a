"""From logits to a token: repetition, temperature, top-k, top-p, min-p."""
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is chosen; None and the defaults restrict nothing.

  temperature: logits are divided by it; 0 takes the likeliest token.
  top_k: keep the k likeliest tokens, and any as likely as the last of them.
  top_p: of those, the fewest likeliest whose probabilities reach top_p.
  min_p: of those, the ones at least min_p times as likely as the likeliest.
  repetition_penalty: before all that, logits of tokens that the prompt or the
    answer holds are divided by it where positive and multiplied where negative
    (arXiv 1909.05858, section 4.1).

  A pytree: programs are compiled for which fields are set, not for values.
  """
  temperature: float | None = 0.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  repetition_penalty: float | None = None

  def checked(self) -> "Sampling":
    """What `sample` takes: None for all that has no effect.

    Raises:
      ValueError: a field is out of its range.
    """
    for name, low, high, whole in (
        ("temperature", 0, math.inf, False), ("top_k", 1, math.inf, True),
        ("top_p", 0, 1, False), ("min_p", 0, 1, False),
        ("repetition_penalty", 0, math.inf, False)):
      value = getattr(self, name)
      if value is None:
        continue
      if isinstance(value, bool) or not isinstance(
          value, int if whole else (int, float)):
        raise ValueError(f"{name}={value!r}: give a "
                         f"{'whole ' if whole else ''}number or None")
      open_below = name in ("top_p", "repetition_penalty")
      if not (low < value if open_below else low <= value) or not (
          value <= high and math.isfinite(value)):
        bounds = f"{'above' if open_below else 'at least'} {low}"
        raise ValueError(f"{name}={value}: must be {bounds}"
                         + (f" and at most {high}" if high == 1 else ""))
    penalty = self.repetition_penalty
    penalty = None if penalty == 1 else penalty
    if not self.temperature:
      return Sampling(None, repetition_penalty=penalty)
    return dataclasses.replace(
        self, top_p=None if self.top_p == 1 else self.top_p,
        min_p=self.min_p or None, repetition_penalty=penalty)


def sample(logits_BV, key, sampling: Sampling, seen_BV=None):
  """A token a row, int32 [B].

  Args:
    logits_BV: float32.
    sampling: `checked`.
    seen_BV: bool, which tokens the repetition penalty strikes.
  """
  if sampling.repetition_penalty is not None:
    penalty = sampling.repetition_penalty
    struck = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    logits_BV = jnp.where(seen_BV, struck, logits_BV)
  if sampling.temperature is None:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  logits_BV = restrict(logits_BV / sampling.temperature, sampling)
  return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def restrict(logits_BV, sampling: Sampling):
  """Logits with -inf for the tokens that top-k, top-p and min-p leave out."""
  if sampling.top_k is not None:
    kept = _fewest(jax.nn.softmax(logits_BV), lambda kept_BV: jnp.sum(
        kept_BV, -1) >= sampling.top_k)
    logits_BV = jnp.where(kept, logits_BV, -jnp.inf)
  if sampling.top_p is not None:
    probs_BV = jax.nn.softmax(logits_BV)
    kept = _fewest(probs_BV, lambda kept_BV: jnp.sum(
        jnp.where(kept_BV, probs_BV, 0), -1) >= sampling.top_p)
    logits_BV = jnp.where(kept, logits_BV, -jnp.inf)
  if sampling.min_p is not None:
    least = jnp.max(logits_BV, -1, keepdims=True) + jnp.log(sampling.min_p)
    logits_BV = jnp.where(logits_BV >= least, logits_BV, -jnp.inf)
  return logits_BV


def _fewest(x_BV, enough):
  """The fewest largest entries of x >= 0 for which `enough` (all if never).

  The threshold is found bit by bit: floats that are not negative order as
  their bits do. A sort of a large vocabulary would take many times as long.
  """
  bits_BV = lax.bitcast_convert_type(x_BV.astype(jnp.float32), jnp.int32)

  def try_bit(i, threshold_B):
    higher_B = threshold_B | (1 << (30 - i))
    return jnp.where(enough(bits_BV >= higher_B[:, None]), higher_B,
                     threshold_B)

  threshold_B = lax.fori_loop(0, 31, try_bit,
                              jnp.zeros(x_BV.shape[0], jnp.int32))
  return bits_BV >= threshold_B[:, None]
