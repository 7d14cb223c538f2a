"""Norms after the sum, as in the original Transformer."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig
from jaxlm.model.cache import empty_cache
from jaxlm.model.costs import parameter_counts
from jaxlm.model.transformer import (Execution, forward, forward_with_cache,
                                     per_layer)
from quick import quick_jit

BATCH, LENGTH, HEADS, HEAD_DIM, D_MODEL = 2, 9, 3, 4, 10
CONFIG = ModelConfig(
    23, D_MODEL, 3, AttentionConfig(HEADS, HEADS, HEAD_DIM),
    MLPConfig(14, "relu", gated=False, bias=True),
    norm=NormConfig("layernorm", 1e-5, placement="post"), max_positions=11)
TOKENS = np.random.default_rng(0).integers(0, 23, (BATCH, LENGTH))


@functools.cache
def params():
  """Random, none of them 0 or 1, so that each matters."""
  random = np.random.default_rng(1)
  def leaf(path, like):
    centre = 1 if "scale" in jax.tree_util.keystr(path[-1:]) else 0
    return jnp.float32(centre + 0.3 * random.normal(size=like.shape))
  return jax.tree.map_with_path(leaf, jaxlm.abstract_params(CONFIG))


def layer_norm(p, x):
  x = x - jnp.mean(x, -1, keepdims=True)
  return (x / jnp.sqrt(jnp.mean(x ** 2, -1, keepdims=True) + 1e-5)
          * p["scale"] + p["bias"])


def attend(p, x):
  q, k, v = (jnp.einsum("BTD,DNH->BNTH", x, p[f"{name}_proj"])
             for name in "qkv")
  scores = jnp.einsum("BNTH,BNSH->BNTS", q, k) / HEAD_DIM ** 0.5
  seen = np.tri(LENGTH, dtype=bool)
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
  return jnp.einsum("BNTS,BNSH,NHD->BTD", weights, v, p["o_proj"])


def feed_forward(p, x):
  return jnp.maximum(x @ p["up"] + p["up_bias"], 0) @ p["down"] + p["down_bias"]


def reference(params):
  x = (params["embed"]["embedding"][TOKENS]
       + params["embed"]["positions"][:LENGTH])
  for i in range(CONFIG.num_layers):
    p = jax.tree.map(lambda leaf: leaf[i], params["stack_0"]["layer_0"])
    x = layer_norm(p["attention_post_norm"], x + attend(p["attention"], x))
    x = layer_norm(p["mlp_post_norm"], x + feed_forward(p["mlp"], x))
  return layer_norm(params["final_norm"], x)


def hidden(execution, params):
  return forward(CONFIG, params, TOKENS, execution=execution).hidden_BTD


def value_and_gradients(function, params):
  direction = np.random.default_rng(2).normal(size=(BATCH, LENGTH, D_MODEL))

  @quick_jit
  def run(params):
    y, vjp = jax.vjp(function, params)
    return y, vjp(direction.astype(np.float32))
  return run(params)


@functools.cache
def expected():
  return value_and_gradients(reference, params())


@pytest.mark.parametrize("execution", [Execution(),
                                       Execution(scan_layers=False)])
def test_values_and_gradients_are_those_of_the_formula(execution):
  found = value_and_gradients(functools.partial(hidden, execution), params())
  for (path, a), (_, b) in zip(*map(jax.tree.leaves_with_path,
                                    (found, expected())), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4,
                               atol=1e-6 + 1e-5 * np.max(np.abs(b)),
                               err_msg=jax.tree_util.keystr(path))
    if "unembedding" not in jax.tree_util.keystr(path):
      assert np.any(a != 0)


def test_token_by_token_over_a_cache_it_is_the_same():
  layers, cache = per_layer(CONFIG, params()), empty_cache(CONFIG, BATCH,
                                                           LENGTH)
  run = quick_jit(functools.partial(forward_with_cache,
                                                     CONFIG))
  found = []
  for span in ([0, 1, 2, 3], *([t] for t in range(4, LENGTH))):
    positions_BT = np.tile(span, (BATCH, 1))
    hidden_BTD, cache = run(layers, cache, TOKENS[:, span], positions_BT)
    found.append(hidden_BTD)
  np.testing.assert_allclose(np.concatenate(found, 1), expected()[0],
                             rtol=1e-4, atol=1e-5)


def test_there_are_as_many_norms_as_before_sub_layers():
  assert parameter_counts(CONFIG).norms == 2 * D_MODEL * (2 * 3 + 1)
  assert parameter_counts(CONFIG).total == sum(
      leaf.size for leaf in jax.tree.leaves(params()))


def test_no_family_of_hugging_faces_is_mistaken_for_it():
  with pytest.raises(ValueError, match="no family of Hugging Face's"):
    jaxlm.families.hf_family(CONFIG)
