"""Token by token over a cache, each family computes what `forward` does."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.model.cache import empty_cache
from jaxlm.model.transformer import forward_with_cache, unstack_layers
import reference_models

WINDOW, MAX_LENGTH, NEW_TOKENS = 13, 61, 20
# Unequal prompts, both longer than the window, so that prefill wraps the ring.
PROMPTS = np.array([29, 17])


@pytest.mark.parametrize("name", reference_models.CASES)
def test_cache_equals_forward(name):
  case = reference_models.case(name)
  config, params, tokens_BT = case.config, case.params, case.tokens_BT
  if config.attention.sliding_window:
    config = dataclasses.replace(config, attention=dataclasses.replace(
        config.attention, sliding_window=WINDOW))
  whole = reference_models.quick_jit(functools.partial(jaxlm.forward, config))
  expected = whole(params, tokens_BT[:, :PROMPTS.max() + NEW_TOKENS]).hidden_BTD
  run = reference_models.quick_jit(functools.partial(forward_with_cache,
                                                     config))
  layers = jax.jit(functools.partial(unstack_layers, config))(params)
  cache = empty_cache(config, len(PROMPTS), MAX_LENGTH)

  def compare(hidden_BTD, positions_BT):
    for hidden, of_row, positions in zip(hidden_BTD, expected, positions_BT):
      real = positions >= 0
      assert reference_models.relative_difference(
          hidden[real], of_row[positions[real]]) <= 3e-5

  # The shorter prompt is padded on its left.
  padding = PROMPTS.max() - PROMPTS
  positions_BT = np.maximum(np.arange(PROMPTS.max()) - padding[:, None], -1)
  for _ in range(1 + NEW_TOKENS):
    new_BT = np.where(positions_BT < 0, 7,
                      np.take_along_axis(tokens_BT, positions_BT, 1))
    hidden_BTD, cache = run(params, layers, cache, jnp.array(new_BT),
                            jnp.array(positions_BT))
    compare(hidden_BTD, positions_BT)
    positions_BT = positions_BT[:, -1:] + 1
