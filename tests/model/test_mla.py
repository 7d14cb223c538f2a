"""Latent attention against its equations, and its two forms against another."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MLAConfig, RopeConfig, YarnScaling
from jaxlm.model import cache as cache_lib
from jaxlm.model.mla import MLA, absorbed_attention, expanded_attention
from jaxlm.model.rope import frequencies, rope_table
from jaxlm.model.transformer import Context

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCH, LENGTH, D_MODEL = 2, 137, 21
CONFIG = MLAConfig(
    num_heads=5, kv_rank=19, nope_head_dim=11, rope_head_dim=6, v_head_dim=13,
    q_rank=23, rope=RopeConfig(100.0, YarnScaling(
        8.0, 64, truncate=True, mscale=0.7, mscale_all_dim=1.3),
        interleaved=True))
DIRECT = MLAConfig(5, 19, 11, 6, 13)
POSITIONS = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))


@functools.cache
def inputs(config):
  """(params, x): every parameter matters."""
  random = np.random.default_rng(2)
  module = MLA(config, 1.0, "auto")
  abstract = jax.eval_shape(
      lambda x: nn.unbox(module.init(jax.random.key(0), x, context(config))),
      jnp.zeros((BATCH, LENGTH, D_MODEL)))["params"]
  def leaf(like):
    centre = 1 if like.ndim == 1 else 0
    return jnp.float32(centre + 0.4 * random.normal(size=like.shape))
  return (jax.tree.map(leaf, abstract),
          jnp.float32(random.normal(size=(BATCH, LENGTH, D_MODEL))))


def context(config, positions_BT=POSITIONS):
  positions_BT = jnp.asarray(positions_BT)
  table = rope_table(config.rope, config.rope_head_dim, positions_BT)
  return Context({"full": table}, positions_BT, None, None)


def rms_norm(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def turned(x_TH, config):
  """Pairs as complex numbers, turned by their position."""
  radians, factor = frequencies(config.rope, config.rope_head_dim)
  return factor * ((x_TH[:, ::2] + 1j * x_TH[:, 1::2])
                   * np.exp(1j * np.arange(len(x_TH))[:, None] * radians))


def by_the_equations(config, params, x_TD):
  """Section 2.1.1, equations 1 to 11, head by head in float64."""
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  nope, rank = config.nope_head_dim, config.kv_rank
  latent = x_TD @ p["kv_a_proj"]
  latent, rope_key = latent[:, :rank], turned(latent[:, rank:], config)
  latent = rms_norm(latent, p["kv_a_norm"]["scale"], config.norm_eps)
  q_b, q_latent = p.get("q_proj"), x_TD
  if config.q_rank is not None:
    q_b, q_latent = p["q_b_proj"], rms_norm(
        x_TD @ p["q_a_proj"], p["q_a_norm"]["scale"], config.norm_eps)
  scale = config.head_dim ** -0.5
  if config.rope.scaling is not None:
    scale *= (0.1 * 1.3 * np.log(8) + 1) ** 2
  total = 0
  for head in range(config.num_heads):
    q = q_latent @ q_b[:, head]
    kv = latent @ p["kv_b_proj"][:, head]
    s = scale * (q[:, :nope] @ kv[:, :nope].T + np.real(
        turned(q[:, nope:], config) @ np.conj(rope_key).T))
    weights = np.tril(np.exp(s))
    weights /= weights.sum(1, keepdims=True)
    total += weights @ kv[:, nope:] @ p["o_proj"][head]
  return total


@pytest.mark.parametrize("config", [CONFIG, DIRECT])
def test_a_sequence_follows_the_equations(config):
  params, x_BTD = inputs(config)
  found, cache = jax.jit(lambda params, x: MLA(config, 1.0, "auto").apply(
      {"params": params}, x, context(config)))(params, x_BTD)
  assert cache is None
  for row, x_TD in zip(found, x_BTD):
    expected = by_the_equations(config, params, np.asarray(x_TD, np.float64))
    np.testing.assert_allclose(row, expected, rtol=1e-4,
                               atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("config", [CONFIG, DIRECT])
def test_token_by_token_is_the_whole_sequence(config):
  params, x_BTD = inputs(config)
  module = MLA(config, 1.0, "auto")
  @jax.jit
  def run(cache, x_BTD, positions_BT):
    return module.apply({"params": params}, x_BTD,
                        context(config, positions_BT), cache)
  expected, _ = module.apply({"params": params}, x_BTD, context(config))
  cache = cache_lib.LatentCache(
      jnp.zeros((BATCH, LENGTH, config.kv_rank + config.rope_head_dim)),
      jnp.full((BATCH, LENGTH), -1))
  prompt = 131
  found, cache = run(cache, x_BTD[:, :prompt], POSITIONS[:, :prompt])
  rows = [found]
  for t in range(prompt, LENGTH):
    found, cache = run(cache, x_BTD[:, t:t + 1], POSITIONS[:, t:t + 1])
    rows.append(found)
  np.testing.assert_allclose(np.concatenate(rows, 1), expected, rtol=1e-4,
                             atol=1e-5 * np.abs(expected).max())


def test_absorbed_is_expanded_whatever_the_order_of_the_slots():
  random = np.random.default_rng(4)
  def normal(*shape):
    return random.normal(size=shape).astype(np.float32)
  heads, nope, rope, value, rank = 5, 11, 6, 13, 19
  q_nope, q_rope = (normal(BATCH, LENGTH, heads, n) for n in (nope, rope))
  latent, rope_key = (normal(BATCH, LENGTH, n) for n in (rank, rope))
  projections = normal(rank, heads, nope), normal(rank, heads, value)
  expected = expanded_attention(q_nope, q_rope, latent, rope_key, *projections,
                                scale=0.2)
  # The last three tokens are new. Seven empty slots hold values that would be
  # noticed.
  keys, cached = np.concatenate([latent, rope_key], -1), LENGTH - 3
  order = random.permutation(cached + 7)
  held = np.pad(keys[:, :cached], ((0, 0), (0, 7), (0, 0)),
                constant_values=1e3)[:, order]
  slots = np.pad(POSITIONS[:, :cached], ((0, 0), (0, 7)),
                 constant_values=-1)[:, order]
  found = absorbed_attention(
      q_nope[:, cached:], q_rope[:, cached:], keys[:, cached:], held,
      *projections, POSITIONS[:, cached:], slots, scale=0.2)
  np.testing.assert_allclose(found, expected[:, cached:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite_and_reach_every_parameter(dtype):
  params, x_BTD = inputs(CONFIG)
  @jax.jit
  @jax.grad
  def gradients(params):
    y, _ = MLA(CONFIG, 1.0, "auto").apply(
        {"params": params}, x_BTD.astype(dtype), context(CONFIG))
    return jnp.sum(jnp.square(y.astype(jnp.float32)))
  for path, g in jax.tree.leaves_with_path(gradients(params)):
    assert np.all(np.isfinite(g)) and np.any(g != 0), path


def test_parameters_are_named_and_shaped():
  shapes = jax.tree.map(jnp.shape, inputs(CONFIG)[0])
  assert shapes == {
      "q_a_proj": (21, 23), "q_a_norm": {"scale": (23,)},
      "q_b_proj": (23, 5, 17), "kv_a_proj": (21, 25),
      "kv_a_norm": {"scale": (19,)}, "kv_b_proj": (19, 5, 24),
      "o_proj": (5, 13, 21)}
  assert set(inputs(DIRECT)[0]) == {"q_proj", "kv_a_proj", "kv_a_norm",
                                    "kv_b_proj", "o_proj"}
