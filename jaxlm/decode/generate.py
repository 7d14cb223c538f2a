"""Generation: the prompt in one pass, then one token after the other.

`generate` is for a few prompts; `prefill` and `decode` are the two compiled
programs it is made of.
"""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model.cache import empty_cache
from jaxlm.model.transformer import (Execution, forward_with_cache, logits,
                                     per_layer)


def generate(config: ModelConfig, params: dict, tokens_BT, *,
             max_new_tokens: int, lengths_B=None, temperature: float = 0.0,
             seed: int = 0, eos: int | None = None,
             execution: Execution = Execution()):
  """Continues prompts.

  Args:
    tokens_BT: int32. Shorter prompts are padded on their left, with any token.
    lengths_B: how many tokens of each row are prompt; all by default.
    temperature: 0 takes the likeliest token; otherwise tokens are drawn from
      the softmax of logits / temperature.
    eos: after this token a row is filled up with it; when all rows are, no
      more is computed.

  Returns:
    int32 [B, max_new_tokens].

  Raises:
    ValueError: a prompt or an argument is impossible.
  """
  tokens_BT = np.asarray(tokens_BT)
  if lengths_B is None:
    lengths_B = np.full(tokens_BT.shape[:1], tokens_BT.shape[-1])
  lengths_B = np.asarray(lengths_B)
  _validate(config, tokens_BT, lengths_B, max_new_tokens, temperature, eos)
  params = _per_layer(config, params)
  logits_BV, cache = prefill(
      config, params, tokens_BT.astype(np.int32), lengths_B,
      max_length=tokens_BT.shape[1] + max_new_tokens, execution=execution)
  return decode(config, params, cache, logits_BV, lengths_B,
                jax.random.key(seed), float(temperature),
                -1 if eos is None else eos, max_new_tokens=max_new_tokens,
                greedy=temperature == 0, execution=execution)


_per_layer = jax.jit(per_layer, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0,
                   static_argnames=("max_length", "execution"))
def prefill(config: ModelConfig, params: dict, tokens_BT, lengths_B, *,
            max_length: int, execution: Execution = Execution()):
  """The logits [B, V] that follow left-padded prompts, and their cache.

  Args:
    params: best `per_layer`.
    max_length: of prompt and new tokens together.
  """
  batch, length = tokens_BT.shape
  padding_B = length - lengths_B
  positions_BT = jnp.maximum(jnp.arange(length) - padding_B[:, None], -1)
  cache = empty_cache(config, batch, max_length, jnp.dtype(execution.dtype))
  hidden_BTD, cache = forward_with_cache(
      config, params, cache, tokens_BT, positions_BT.astype(jnp.int32),
      execution=execution)
  return logits(config, params, hidden_BTD[:, -1]), cache


@functools.partial(
    jax.jit, static_argnums=0,
    static_argnames=("max_new_tokens", "greedy", "execution"))
def decode(config: ModelConfig, params: dict, cache, logits_BV, lengths_B, key,
           temperature=1.0, eos=-1, *, max_new_tokens: int,
           greedy: bool = True, execution: Execution = Execution()):
  """int32 [B, max_new_tokens] that follow what `prefill` returned.

  Args:
    params: best `per_layer`.
    lengths_B: tokens in the cache, of each row.
    eos: -1 for none.
  """
  def choose(step, logits_BV):
    if greedy:
      return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    return jax.random.categorical(jax.random.fold_in(key, step),
                                  logits_BV / temperature).astype(jnp.int32)

  def unfinished(state):
    step, _, _, token_B = state
    return (step < max_new_tokens) & jnp.any(token_B != eos)

  def advance(state):
    step, cache, new_BT, token_B = state
    hidden_BTD, cache = forward_with_cache(
        config, params, cache, token_B[:, None],
        (lengths_B + step - 1).astype(jnp.int32)[:, None], execution=execution)
    chosen_B = choose(step, logits(config, params, hidden_BTD[:, 0]))
    token_B = jnp.where(token_B == eos, eos, chosen_B)
    return step + 1, cache, new_BT.at[:, step].set(token_B), token_B

  token_B = choose(0, logits_BV)
  new_BT = jnp.full((len(token_B), max_new_tokens), eos, jnp.int32)
  state = (jnp.int32(1), cache, new_BT.at[:, 0].set(token_B), token_B)
  return jax.lax.while_loop(unfinished, advance, state)[2]


def _validate(config, tokens_BT, lengths_B, max_new_tokens, temperature, eos):
  def require(condition, message):
    if not condition:
      raise ValueError(message)

  require(tokens_BT.ndim == 2 and tokens_BT.size > 0,
          f"tokens_BT has shape {tokens_BT.shape}: give at least one prompt "
          "and one token, [B, T]")
  require(np.issubdtype(tokens_BT.dtype, np.integer),
          f"tokens_BT has dtype {tokens_BT.dtype}: give integers")
  low, high = tokens_BT.min(), tokens_BT.max()
  require(0 <= low and high < config.vocab_size,
          f"tokens_BT has ids {low}..{high}, outside the vocabulary of "
          f"{config.vocab_size}: is this the model's tokenizer?")
  batch, length = tokens_BT.shape
  require(lengths_B.shape == (batch,)
          and 1 <= lengths_B.min() and lengths_B.max() <= length,
          f"lengths_B={lengths_B.tolist()}: give {batch} lengths from 1 to "
          f"{length}")
  require(max_new_tokens >= 1,
          f"max_new_tokens={max_new_tokens}: must be at least 1")
  # The last new token is never read, so it needs no position.
  needed = int(lengths_B.max()) + max_new_tokens - 1
  require(not config.max_positions or needed <= config.max_positions,
          f"a prompt of {lengths_B.max()} tokens and max_new_tokens="
          f"{max_new_tokens} need {needed} positions, but the model has "
          f"{config.max_positions}: shorten one of them")
  require(temperature >= 0 and math.isfinite(temperature),
          f"temperature={temperature}: must be 0 or a positive number")
  require(eos is None or 0 <= eos < config.vocab_size,
          f"eos={eos} is outside the vocabulary of {config.vocab_size}")
  require(config.moe is None or config.moe.router.kind != "expert_choice",
          "router.kind='expert_choice' chooses tokens from a whole batch: it "
          "cannot generate token by token")
