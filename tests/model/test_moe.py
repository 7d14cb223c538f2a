import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MLPConfig, MoEConfig, RouterConfig
from jaxlm.model.mlp import activate
from jaxlm.model.moe import MoE

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCH, LENGTH, D_MODEL, EXPERTS, PER_TOKEN, D_EXPERT = 2, 19, 14, 5, 3, 6
PLAIN = MLPConfig(D_EXPERT)
GPT_OSS = MLPConfig(D_EXPERT, "clamped_swiglu", bias=True, interleaved=True,
                    swiglu_limit=0.8)
SHARED = MLPConfig(9, "gelu", gated=False, bias=True)


def moe(kind, expert=PLAIN, per_token=PER_TOKEN, shared=None, **router):
  return MoEConfig(EXPERTS, per_token, expert, RouterConfig(kind, **router),
                   shared)


CASES = {
    "mixtral": moe("softmax_topk", renormalize=True),
    "not renormalised": moe("softmax_topk", MLPConfig(D_EXPERT, "relu",
                                                      gated=False)),
    "switch": moe("softmax_topk", per_token=1),
    "gpt-oss": moe("topk_softmax", GPT_OSS, bias=True),
    "balanced": moe("topk_softmax", balance_bias=True, shared=SHARED),
    "noisy": moe("noisy_topk", shared=SHARED),
    "expert choice": moe("expert_choice", shared=SHARED),
    "deepseek": moe("sigmoid_topk", renormalize=True, balance_bias=True,
                    weight_scale=2.5, shared=SHARED),
    "all experts": moe("topk_softmax", per_token=EXPERTS),
}
NOISE = jax.random.key(11)


def inputs(config):
  """(params, x, cotangent): every parameter matters, none is zero."""
  random = np.random.default_rng(5)
  def normal(shape, scale=1.0):
    x = random.normal(size=shape, scale=scale)
    return jnp.array(x.astype(jnp.bfloat16).astype(np.float32))
  shape = BATCH, LENGTH, D_MODEL
  abstract = jax.eval_shape(lambda key: nn.unbox(MoE(
      config, 1.0, "auto").init(key, jnp.zeros(shape))), NOISE)["params"]
  params = jax.tree.map(lambda leaf: normal(leaf.shape, 0.5), abstract)
  return params, normal(shape), normal(shape)


def best(score, count: int):
  """Whether each entry is among the `count` best of its row."""
  rank = jnp.argsort(jnp.argsort(-score))
  return rank < count


def gates(config, params, x_TD):
  """Weights of all experts for all tokens, 0 where not chosen [T, E]."""
  router = config.router
  logits = x_TD @ params["router"] + params.get("router_bias", 0)
  if router.kind == "noisy_topk":
    noise = jax.random.normal(NOISE, logits.shape)
    logits += noise * jnp.logaddexp(x_TD @ params["router_noise"], 0)
  probs = jnp.exp(logits) / jnp.sum(jnp.exp(logits), 1, keepdims=True)
  if router.kind == "sigmoid_topk":
    probs = 1 / (1 + jnp.exp(-logits))
  if router.kind == "expert_choice":
    capacity = -(-len(x_TD) * config.experts_per_token // EXPERTS)
    return jnp.where(best(probs.T, capacity).T, probs, 0)
  chosen = best(probs + params.get("balance_bias", 0),
                config.experts_per_token)
  kept = jnp.where(chosen, probs, 0)
  if router.kind == "softmax_topk" and not router.renormalize:
    return kept
  return router.weight_scale * kept / jnp.sum(kept, 1, keepdims=True)


def network(config, params, x):
  """A feed-forward network on [..., D], its weights with any leading axes."""
  name = "gate_up" if config.gated else "up"
  h = x @ params[name]
  if config.bias:
    h += params[name + "_bias"][..., None, :]
  y = activate(h, config) @ params["down"]
  return y + params["down_bias"][..., None, :] if config.bias else y


def dense(config, params, x_BTD):
  """Every expert on every token, weighted."""
  x_TD = x_BTD.reshape(-1, D_MODEL)
  y_ETD = network(config.expert, params, x_TD)
  y_TD = jnp.einsum("TE,ETD->TD", gates(config, params, x_TD), y_ETD)
  if config.shared is not None:
    y_TD += network(config.shared, params["shared"], x_TD)
  return y_TD.reshape(x_BTD.shape)


def layer(config, params, x_BTD, implementation="ragged"):
  """"ragged" is quick to compile."""
  return MoE(config, 1.0, implementation).apply({"params": params}, x_BTD,
                                                NOISE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def values_and_gradients(function, config, params, x, dy):
  y, vjp = jax.vjp(functools.partial(function, config), params, x)
  return y, vjp(dy)


def output(config, params, x):
  return layer(config, params, x)[0]


def looped(config, params, x):
  return layer(config, params, x, "xla")[0]


@pytest.mark.parametrize("case, function", [
    *((case, output) for case in CASES),
    ("gpt-oss", looped), ("expert choice", looped)])
def test_values_and_gradients_are_those_of_every_expert_on_every_token(
    case, function):
  config = CASES[case]
  args = inputs(config)
  found = values_and_gradients(function, config, *args)
  expected = values_and_gradients(dense, config, *args)
  for (path, a), (_, b) in zip(*map(jax.tree.leaves_with_path,
                                    (found, expected)), strict=True):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=name,
                               atol=1e-6 + 3e-6 * np.max(np.abs(b)))
    # What moves nothing would also pass a wrong gradient.
    assert np.any(b != 0) == ("balance_bias" not in name), name


@pytest.mark.parametrize("config", [
    # The gradient jumps where it is clamped, so the clamp is out of reach.
    moe("topk_softmax", dataclasses.replace(GPT_OSS, swiglu_limit=100.0),
        bias=True),
    CASES["expert choice"]])
def test_bfloat16_is_close_and_routes_the_same(config):
  params, x, dy = inputs(config)
  exact, exact_gradients = values_and_gradients(dense, config, params, x, dy)
  half = x.astype(jnp.bfloat16)
  y, (gradients, dx) = values_and_gradients(output, config, params, half,
                                            dy.astype(jnp.bfloat16))
  assert y.dtype == dx.dtype == jnp.bfloat16
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))
  # x is the same number in both, so the router sees no difference; what
  # follows is rounded a few times to 8 bits.
  for a, b in [(y, exact), (dx, exact_gradients[1]),
               *zip(*map(jax.tree.leaves, (gradients, exact_gradients[0])))]:
    error = np.linalg.norm(np.asarray(a, np.float32) - b)
    assert error <= 0.015 * np.linalg.norm(b)


@pytest.mark.parametrize("case", ["switch", "noisy", "expert choice"])
def test_every_balancing_loss_has_finite_gradients_for_the_router(case):
  config = CASES[case]
  params, x, _ = inputs(config)
  @jax.jit
  def jacobian(params):
    return jax.jacrev(lambda p: layer(config, p, x)[1].losses)(params)
  for name, gradients in jacobian(params).items():
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
    assert np.any(gradients["router"] != 0), name
    if name == "cv_load":
      assert np.any(gradients["router_noise"] != 0)


def test_report_of_a_batch():
  config = CASES["gpt-oss"]
  params, x, _ = inputs(config)
  report = jax.jit(layer, static_argnums=0)(config, params, x)[1]
  chosen = np.asarray(gates(config, params, x.reshape(-1, D_MODEL))) > 0
  np.testing.assert_allclose(report.load_E, chosen.sum(0) / chosen.sum(),
                             rtol=1e-6)
  assert report.dropped == 0
  share_BE = chosen.reshape(BATCH, LENGTH, EXPERTS).mean(1) / PER_TOKEN
  probs_TE = jax.nn.softmax(x.reshape(-1, D_MODEL) @ params["router"]
                            + params["router_bias"])
  probs_BE = np.mean(probs_TE.reshape(BATCH, LENGTH, EXPERTS), 1)
  np.testing.assert_allclose(
      report.losses["sequence"],
      EXPERTS * np.mean(np.sum(share_BE * probs_BE, 1)), rtol=1e-5)


def test_expert_choice_reports_who_was_dropped():
  config = CASES["expert choice"]
  params, x, _ = inputs(config)
  config = dataclasses.replace(config, experts_per_token=1)
  y, report = jax.jit(layer, static_argnums=0)(config, params, x)
  taken = np.asarray(gates(config, params, x.reshape(-1, D_MODEL))) > 0
  np.testing.assert_allclose(report.dropped, np.mean(~taken.any(1)), rtol=1e-5)
  assert 0 < report.dropped < 1
  # A dropped token has the shared expert alone.
  alone = network(SHARED, params["shared"], x.reshape(-1, D_MODEL))
  same = np.isclose(y.reshape(-1, D_MODEL), alone, rtol=1e-6).all(1)
  np.testing.assert_array_equal(same, ~taken.any(1))
