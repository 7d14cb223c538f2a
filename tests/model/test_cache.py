import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (AttentionConfig, MLAConfig, MLPConfig, ModelConfig,
                          RopeConfig)
from jaxlm.model import cache as cache_lib
from jaxlm.model import transformer

pytestmark = pytest.mark.usefixtures("quick_compile")

WINDOW = 5
ROPED = ModelConfig(
    61, 14, 3, AttentionConfig(6, 2, 10, RopeConfig(), RopeConfig(1e5),
                               sliding_window=WINDOW, sinks=True),
    mlp=MLPConfig(22), layer_pattern=("sliding", "full"))
LEARNED = ModelConfig(61, 14, 2, AttentionConfig(3, 1, 4), mlp=MLPConfig(22),
                      max_positions=19)
LATENT = ModelConfig(61, 14, 2, MLAConfig(3, 11, 7, 4, 9, q_rank=8),
                     mlp=MLPConfig(22))


@pytest.fixture(params=["cpu", "accelerator"])
def written(request):
  """Writes to a cache as it lies on that platform."""
  if request.param == "cpu":
    return functools.partial(_written, lambda batch, slots: (
        cache_lib.CPULayerCache, (batch, 3, 2, slots), (batch, 3, slots, 2)))
  return functools.partial(_written, lambda batch, slots: (
      cache_lib.LayerCache, (batch, slots, 6), (batch, slots, 6)))


def _written(layout, slots, *steps):
  """Positions in the slots of a cache after writing rows of positions.

  Keys and values are the positions too, so the three must agree.
  """
  batch = len(steps[0])
  kind, k_shape, v_shape = layout(batch, slots)
  cache = kind(jnp.zeros(k_shape), jnp.zeros(v_shape),
               jnp.full((batch, slots), -1, jnp.int32))
  for step in steps:
    positions = jnp.array(step, jnp.int32)
    k = jnp.broadcast_to(positions[..., None, None], (*positions.shape, 3, 2))
    cache = cache_lib.write(cache, k.astype(jnp.float32),
                            -k.astype(jnp.float32), positions)
  holds = cache.positions_BS
  for x_BSKH, sign in zip(cache.keys_and_values(3), (1, -1)):
    expected = jnp.where(holds < 0, 0, sign * holds)[:, :, None, None]
    np.testing.assert_array_equal(
        x_BSKH, jnp.broadcast_to(expected, (batch, slots, 3, 2)))
  return holds.tolist()


def test_a_position_lives_in_its_slot(written):
  assert written(4, [[0, 1, 2]]) == [[0, 1, 2, -1]]
  assert written(4, [[0, 1, 2]], [[3]], [[4]], [[5]]) == [[4, 5, 2, 3]]


def test_of_more_tokens_than_slots_the_last_stay(written):
  assert written(3, [[0, 1, 2, 3, 4, 5, 6]]) == [[6, 4, 5]]
  assert written(3, [[0, 1, 2, 3]], [[4]]) == [[3, 4, 2]]


def test_padding_is_written_nowhere(written):
  assert written(4, [[-1, -1, 0], [0, 1, 2]], [[1], [3]]) == [
      [0, 1, -1, -1], [0, 1, 2, 3]]
  # Padding pushes nothing out of a ring that has wrapped.
  assert written(3, [[-1, -1, -1, 0, 1], [0, 1, 2, 3, 4]]) == [
      [0, 1, -1], [3, 4, 2]]


def test_sliding_layers_hold_a_window_and_full_layers_everything():
  caches = cache_lib.empty_cache(ROPED, 2, 12, jnp.bfloat16)
  assert [c.k_BKHS.shape for c in caches] == [
      (2, 2, 10, WINDOW), (2, 2, 10, 12), (2, 2, 10, WINDOW)]
  assert caches[0].k_BKHS.dtype == jnp.bfloat16
  assert cache_lib.cache_slots(ROPED, "sliding", 3) == 3


def test_on_an_accelerator_heads_lie_side_by_side(monkeypatch):
  monkeypatch.setattr(cache_lib.platforms, "platform", lambda: "tpu")
  caches = cache_lib.empty_cache(ROPED, 2, 12)
  assert [c.k_BSI.shape for c in caches] == [
      (2, WINDOW, 20), (2, 12, 20), (2, WINDOW, 20)]
  assert all(c.v_BSI.shape == c.k_BSI.shape for c in caches)


def test_latent_layers_hold_a_latent_and_a_key_for_all_heads():
  cache = cache_lib.empty_cache(LATENT, 2, 12, jnp.bfloat16)[1]
  assert isinstance(cache, cache_lib.LatentCache)
  assert [x.shape for x in cache] == [(2, 12, 15), (2, 12)]
  assert cache.key_BSR.dtype == jnp.bfloat16


@functools.partial(jax.jit, static_argnums=0)
def step(config, params, caches, tokens, positions):
  return transformer.forward_with_cache(config, params, caches, tokens,
                                        positions)


@functools.partial(jax.jit, static_argnums=0)
def whole(config, params, tokens):
  return transformer.forward(config, params, tokens).hidden_BTD


@pytest.mark.parametrize("config, prompt, platform", [
    (ROPED, 2, "cpu"), (ROPED, 9, "cpu"), (LEARNED, 9, "cpu"),
    (LATENT, 9, "cpu"), (ROPED, 9, "tpu")])
def test_decoding_sees_what_the_whole_sequence_sees(config, prompt, platform,
                                                    monkeypatch):
  """Two rows, the first of them three tokens shorter and padded at the left."""
  length, pad = 19, 3
  random = np.random.default_rng(0)
  params = jax.tree.map(
      lambda leaf: 0.3 * random.normal(size=leaf.shape).astype(np.float32),
      transformer.abstract_params(config))
  tokens = random.integers(0, 61, (2, length))
  positions = np.stack([np.arange(length) - pad, np.arange(length)])
  positions = np.maximum(positions, -1)
  with monkeypatch.context() as patched:
    patched.setattr(cache_lib.platforms, "platform", lambda: platform)
    caches = cache_lib.empty_cache(config, 2, length)
  hidden, caches = step(config, params, caches,
                        tokens[:, :pad + prompt], positions[:, :pad + prompt])
  rows = [hidden]
  for t in range(pad + prompt, length):
    hidden, caches = step(config, params, caches, tokens[:, t:t + 1],
                          positions[:, t:t + 1])
    rows.append(hidden)
  found = np.concatenate(rows, 1)
  tokens[0] = np.roll(tokens[0], -pad)
  expected = whole(config, params, tokens)
  np.testing.assert_allclose(found[0, pad:], expected[0, :-pad], rtol=1e-4,
                             atol=1e-5)
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
