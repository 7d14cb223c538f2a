"""Generation: the prompt in one pass, then one token after the other.

`generate` gives all new tokens at once and `stream` gives them as they come;
both are made of three compiled programs, `prefill`, `start` and `decode`.
"""
from collections.abc import Iterator, Sequence
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.decode.sampling import Sampling, sample
from jaxlm.model.cache import Cache, empty_cache
from jaxlm.model.transformer import (Execution, forward_with_cache, logits,
                                     per_layer)

# New tokens that `stream` hands over together: more would come in bursts,
# fewer would leave and enter the compiled loop too often.
CHUNK = 8


class State(typing.NamedTuple):
  """Where a batch of answers stands.

  token_B: the newest tokens, not yet in the cache.  position_B: theirs.
  done_B: ended by a stop token; such rows repeat it.
  seen_BV: which tokens a row holds, or None without repetition penalty.
  """
  cache: Cache
  token_B: jax.Array
  position_B: jax.Array
  done_B: jax.Array
  seen_BV: jax.Array | None
  key: jax.Array


def generate(config: ModelConfig, params: dict, tokens_BT, *,
             max_new_tokens: int, lengths_B=None,
             sampling: Sampling = Sampling(), seed: int = 0,
             stop_tokens: Sequence[int] = (),
             execution: Execution = Execution()):
  """Continues prompts.

  Args:
    tokens_BT: int32. Shorter prompts are padded on their left, with any token.
    lengths_B: how many tokens of each row are prompt; all by default.
    stop_tokens: after one of these a row is filled up with it; when all rows
      are, no more is computed.

  Returns:
    int32 [B, max_new_tokens].

  Raises:
    ValueError: a prompt or an argument is impossible.
  """
  parts = _chunks(config, params, tokens_BT, lengths_B, max_new_tokens,
                  sampling, seed, stop_tokens, execution, max_new_tokens,
                  np.shape(tokens_BT)[-1] + max_new_tokens)
  return jnp.concatenate(list(parts), 1)


def stream(config: ModelConfig, params: dict, tokens_T, *, max_new_tokens: int,
           sampling: Sampling = Sampling(), seed: int = 0,
           stop_tokens: Sequence[int] = (),
           execution: Execution = Execution()) -> Iterator[list[int]]:
  """The tokens that follow one prompt, a few at a time.

  Ends after max_new_tokens or before the first stop token. See `generate`.
  Programs are compiled for a few lengths alone, to which prompts are padded.
  """
  tokens_BT = np.asarray(tokens_T)[None]
  length = tokens_BT.shape[-1]
  padding = rounded_length(length) - length
  padded_BT = np.pad(tokens_BT, ((0, 0), (padding, 0)))
  parts = _chunks(config, params, padded_BT, [length], max_new_tokens,
                  sampling, seed, stop_tokens, execution, CHUNK,
                  rounded_length(length + padding + max_new_tokens))
  for part in parts:
    tokens = np.asarray(part)[0].tolist()
    ends = [i for i, token in enumerate(tokens) if token in stop_tokens]
    if ends:
      yield tokens[:ends[0]]
      return
    yield tokens


def rounded_length(length: int) -> int:
  """The least of 32, 64, 96, 128, 160, 192, 224, 256, 320, ... that holds it:
  at most a quarter (32 below 128) too long."""
  step = max(32, (1 << (length - 1).bit_length()) // 8)
  return -(-length // step) * step


def _chunks(config, params, tokens_BT, lengths_B, max_new_tokens, sampling,
            seed, stop_tokens, execution, chunk, max_length):
  """The new tokens in parts [B, n]: the first alone, then `chunk` at a time."""
  tokens_BT = np.asarray(tokens_BT)
  if lengths_B is None:
    lengths_B = np.full(tokens_BT.shape[:1], tokens_BT.shape[-1])
  lengths_B = np.asarray(lengths_B)
  _validate(config, tokens_BT, lengths_B, max_new_tokens, stop_tokens)
  sampling = sampling.checked()
  stop = np.array(sorted(stop_tokens), np.int32)
  params = _per_layer(config, params)
  tokens_BT = tokens_BT.astype(np.int32)
  logits_BV, cache = prefill(
      config, params, tokens_BT, lengths_B,
      max_length=max_length, execution=execution)
  state = start(config, cache, logits_BV, tokens_BT, lengths_B,
                jax.random.key(seed), sampling, stop)
  yield state.token_B[:, None]
  left = max_new_tokens - 1
  while left > 0:
    count = min(left, chunk)
    tokens, state = decode(config, params, state, sampling, stop,
                           np.int32(count), most=chunk,
                           execution=execution)
    yield tokens[:, :count]
    left -= count


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
  return logits(config, params, hidden_BTD[:, -1], execution.fsdp), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def start(config: ModelConfig, cache, logits_BV, tokens_BT, lengths_B, key,
          sampling: Sampling, stop_tokens) -> State:
  """Chooses the first new tokens from what `prefill` returned."""
  batch, length = tokens_BT.shape
  seen_BV = None
  if sampling.repetition_penalty is not None:
    # Padding is written past the vocabulary, that is nowhere.
    padding_BT = jnp.arange(length) < (length - lengths_B)[:, None]
    column_BT = jnp.where(padding_BT, config.vocab_size, tokens_BT)
    seen_BV = jnp.zeros((batch, config.vocab_size), bool).at[
        jnp.arange(batch)[:, None], column_BT].set(True, mode="drop")
  state = State(cache, jnp.zeros(batch, jnp.int32),
                lengths_B.astype(jnp.int32) - 1, jnp.zeros(batch, bool),
                seen_BV, key)
  return _choose(state, logits_BV, sampling, stop_tokens)


def _choose(state: State, logits_BV, sampling, stop_tokens) -> State:
  """The state with the next tokens, their positions and the next key."""
  key, next_key = jax.random.split(state.key)
  chosen_B = sample(logits_BV, key, sampling, state.seen_BV)
  token_B = jnp.where(state.done_B, state.token_B, chosen_B)
  seen_BV = state.seen_BV
  if seen_BV is not None:
    seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
  return state._replace(
      token_B=token_B, position_B=state.position_B + 1, seen_BV=seen_BV,
      done_B=jnp.isin(token_B, stop_tokens), key=next_key)


def _jit_in_place(function):
  """jit for the decoding loop. On the CPU, XLA needs to be told to look closely
  enough to see that the cache is read before it is written, not copied."""
  @functools.cache
  def jitted(platform):
    options = {"xla_cpu_copy_insertion_use_region_analysis": True}
    return jax.jit(function, static_argnums=0, donate_argnums=2,
                   static_argnames=("most", "execution"),
                   compiler_options=options if platform == "cpu" else None)

  @functools.wraps(function)
  def call(*args, **kwargs):
    return jitted(jax.default_backend())(*args, **kwargs)

  return call


@_jit_in_place
def decode(config: ModelConfig, params: dict, state: State,
           sampling: Sampling, stop_tokens, count, *, most: int,
           execution: Execution = Execution()):
  """The next `count` tokens, int32 [B, most], and the state after them.

  Args:
    params: best `per_layer`.
    sampling: `checked`.
    stop_tokens: int32 [n], n may be 0.
    count: at most `most`; what lies behind it in the result has no meaning.
  """
  def unfinished(carry):
    step, state, _ = carry
    return (step < count) & ~jnp.all(state.done_B)

  def advance(carry):
    step, state, new_BT = carry
    hidden_BTD, cache = forward_with_cache(
        config, params, state.cache, state.token_B[:, None],
        state.position_B[:, None], execution=execution)
    state = _choose(state._replace(cache=cache),
                    logits(config, params, hidden_BTD[:, 0], execution.fsdp),
                    sampling, stop_tokens)
    return step + 1, state, new_BT.at[:, step].set(state.token_B)

  # Rows that have ended repeat their stop token.
  new_BT = jnp.tile(state.token_B[:, None], (1, most))
  step, state, new_BT = jax.lax.while_loop(
      unfinished, advance, (jnp.int32(0), state, new_BT))
  late_T = jnp.arange(most) >= step
  return jnp.where(late_T, state.token_B[:, None], new_BT), state


def _require(condition, message: str):
  if not condition:
    raise ValueError(message)


def check_tokens(config: ModelConfig, tokens_BT: np.ndarray) -> None:
  """Raises ValueError unless these are a batch of the model's tokens."""
  _require(tokens_BT.ndim == 2 and tokens_BT.size > 0,
           f"tokens_BT has shape {tokens_BT.shape}: give at least one prompt "
           "and one token, [B, T]")
  _require(np.issubdtype(tokens_BT.dtype, np.integer),
           f"tokens_BT has dtype {tokens_BT.dtype}: give integers")
  low, high = tokens_BT.min(), tokens_BT.max()
  _require(0 <= low and high < config.vocab_size,
           f"tokens_BT has ids {low}..{high}, outside the vocabulary of "
           f"{config.vocab_size}: is this the model's tokenizer?")


def _validate(config, tokens_BT, lengths_B, max_new_tokens, stop_tokens):
  check_tokens(config, tokens_BT)
  batch, length = tokens_BT.shape
  _require(lengths_B.shape == (batch,)
           and 1 <= lengths_B.min() and lengths_B.max() <= length,
           f"lengths_B={lengths_B.tolist()}: give {batch} lengths from 1 to "
           f"{length}")
  _require(max_new_tokens >= 1,
           f"max_new_tokens={max_new_tokens}: must be at least 1")
  # The last new token is never read, so it needs no position.
  needed = int(lengths_B.max()) + max_new_tokens - 1
  _require(not config.max_positions or needed <= config.max_positions,
           f"a prompt of {lengths_B.max()} tokens and max_new_tokens="
           f"{max_new_tokens} need {needed} positions, but the model has "
           f"{config.max_positions}: shorten one of them")
  outside = [token for token in stop_tokens
             if not 0 <= token < config.vocab_size]
  _require(not outside, f"stop_tokens {outside} are outside the vocabulary of "
           f"{config.vocab_size}")
  _require(config.moe is None or config.moe.router.kind != "expert_choice",
           "router.kind='expert_choice' chooses tokens from a whole batch: it "
           "cannot generate token by token")
