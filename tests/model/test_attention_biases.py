"""The bias of the keys is redundant, but only where nothing else is added.

Any such bias adds q b to all scores of a query, and a softmax does not see
what is added to all of them (arXiv 2302.08626). It does see it if a sink's
logit stays behind, if scores are capped, or if rotary positions turn the bias
differently for each key.
"""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, NormConfig,
                          RopeConfig)
from jaxlm.model.attention import Attention
from jaxlm.model.transformer import make_context

pytestmark = pytest.mark.usefixtures("quick_compile")

PLAIN = AttentionConfig(6, 2, 10, sliding_window=5,
                        biases=("q", "k", "v", "o"))
SHAPE = 2, 17, 14


@functools.cache
def layer(config, kind):
  """Attention as a compiled function, and random parameters."""
  model = ModelConfig(61, SHAPE[-1], 2, config, mlp=MLPConfig(22))
  context = make_context(model, jnp.zeros(SHAPE[:2], jnp.int32))
  attention = Attention(config, kind, NormConfig(), 1.0, "reference")
  x_BTD = jnp.zeros(SHAPE)
  random = np.random.default_rng(3)
  # None of them is 0: queries, sinks and all biases matter.
  params = jax.tree.map(
      lambda x: jnp.float32(random.normal(size=x.shape)),
      jax.eval_shape(attention.init, jax.random.key(0), x_BTD, context))
  return jax.jit(lambda params, x: attention.apply(params, x, context)[0]), (
      nn.meta.unbox(params))


def effect(config, name, kind="full"):
  """How far outputs move, of their size, if a bias of attention does."""
  run, params = layer(config, kind)
  random = np.random.default_rng(5)
  x_BTD = jnp.float32(random.normal(size=SHAPE))
  moved = {**params["params"]}
  moved[f"{name}_bias"] += random.normal(size=moved[f"{name}_bias"].shape)
  before, after = run(params, x_BTD), run({"params": moved}, x_BTD)
  return float(jnp.abs(after - before).max() / jnp.abs(before).max())


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_bias_of_the_keys_does_nothing(kind):
  assert effect(PLAIN, "k", kind) < 1e-5


@pytest.mark.parametrize("changes", [
    {"sinks": True}, {"soft_cap": 3.0}, {"rope_full": RopeConfig()}])
def test_a_bias_of_the_keys_does_something(changes):
  assert effect(dataclasses.replace(PLAIN, **changes), "k") > 1e-2


@pytest.mark.parametrize("name", ["q", "v", "o"])
def test_other_biases_do_something(name):
  assert effect(PLAIN, name) > 1e-2
