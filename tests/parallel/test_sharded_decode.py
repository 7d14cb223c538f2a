"""Decoding with a cache that is split over devices."""
import functools
import types

import jax
import numpy as np
import pytest

from jaxlm.config import (AttentionConfig, MLAConfig, MLPConfig, ModelConfig,
                          RopeConfig)
from jaxlm.model import cache as cache_lib
from jaxlm.model.transformer import (Execution, forward_with_cache,
                                     init_params, per_layer)
from jaxlm.parallel import mesh as mesh_lib
from jaxlm.parallel.params import shardings
from quick import quick_jit

BATCH, PROMPT, NEW = 8, 11, 3
SHAPE = dict(vocab_size=40, d_model=48, num_layers=2, mlp=MLPConfig(56))
MODELS = {
    "sliding and full": ModelConfig(
        **SHAPE, layer_pattern=("sliding", "full"),
        attention=AttentionConfig(
            8, 4, 6, RopeConfig(), RopeConfig(), sliding_window=5, sinks=True,
            biases=("q", "k", "v", "o"))),
    "latent": ModelConfig(
        **SHAPE, attention=MLAConfig(4, 10, 8, 6, 12, q_rank=14)),
}
EXECUTION = Execution(attention="xla", fsdp=False)


def decode(config, params):
  """Hidden states of left-padded prompts, then of tokens one by one, the
  second row of which ends early; and the caches."""
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, 40, (BATCH, PROMPT + NEW)).astype(np.int32)
  positions = np.arange(PROMPT + NEW) - rng.integers(0, 4, (BATCH, 1))
  positions = np.maximum(positions, -1).astype(np.int32)
  positions[1, -1] = -1
  found = []
  cache = quick_jit(lambda: cache_lib.empty_cache(
      config, BATCH, PROMPT + NEW))()
  step = quick_jit(functools.partial(forward_with_cache, config,
                                     execution=EXECUTION))
  for part in (slice(PROMPT), *(slice(i, i + 1)
                                for i in range(PROMPT, PROMPT + NEW))):
    hidden, cache = step(params, cache, tokens[:, part], positions[:, part])
    found.append(np.where(positions[:, part, None] < 0, 0, hidden))
  return found, cache


@pytest.mark.parametrize("name, platform, sizes", [
    ("sliding and full", "cpu", {"data": 2, "expert": 2, "tensor": 2}),
    ("sliding and full", "tpu", {"data": 2, "tensor": 4}),
    ("sliding and full", "tpu", {"expert": 8}),
    ("latent", "cpu", {"data": 2, "expert": 2, "tensor": 2})])
def test_decoding_is_that_of_one_device(name, platform, sizes, monkeypatch):
  # As it lies on this platform, computed on the one that is here.
  monkeypatch.setattr(cache_lib, "platforms", types.SimpleNamespace(
      platform=lambda: platform))
  config = MODELS[name]
  params = jax.jit(lambda: per_layer(config, init_params(
      config, jax.random.key(0))))()
  mesh = mesh_lib.make_mesh(sizes)
  with jax.set_mesh(mesh):
    found, cache = decode(config, jax.device_put(
        params, shardings(config, params, mesh, fsdp=False)))
  for layer in cache:
    for x, axes in zip(layer, layer.logical_axes, strict=True):
      assert x.sharding.is_equivalent_to(
          jax.NamedSharding(mesh, mesh_lib.spec(*axes)), x.ndim)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5,
                                 atol=3e-6),
               (found, cache), decode(config, params))


@pytest.mark.parametrize("sizes, message", [
    ({"context": 8}, "context=8: sequences that grow are not split"),
    ({"tensor": 8}, "kv_heads=4 does not divide .*tensor=8: use 1, 2 or 4"),
    ({"data": 8}, "batch=6 does not divide over the mesh's data=8")])
def test_what_no_cache_can_be_split_by_is_refused(sizes, message):
  with jax.set_mesh(mesh_lib.make_mesh(sizes)):
    with pytest.raises(ValueError, match=message):
      cache_lib.empty_cache(MODELS["sliding and full"], 6 if "data" in sizes
                            else BATCH, 9)
