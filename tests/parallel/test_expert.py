"""The expert layer on eight devices is the expert layer on one."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MLPConfig, MoEConfig, RouterConfig
from jaxlm.model.moe import MoE
from jaxlm.model.routing import choose, router_inputs
from jaxlm.model.transformer import REMAT_POLICIES
from jaxlm.parallel import dispatch, mesh
from jaxlm.parallel.schemes import SCHEMES
from pallas_kernels.quant import Int8

pytestmark = pytest.mark.usefixtures("quick_compile", "small_rounds")

BATCH, LENGTH, D_MODEL, EXPERTS, PER_TOKEN, D_EXPERT = 8, 4, 20, 16, 3, 14
HALVES = MLPConfig(D_EXPERT)
PAIRS = MLPConfig(D_EXPERT, "clamped_swiglu", bias=True, interleaved=True,
                  swiglu_limit=0.8)
MESHES = [{"expert": 8}, {"expert": 4, "tensor": 2}, {"expert": 2, "data": 4},
          {"expert": 2, "data": 2, "tensor": 2}, {"expert": 2, "context": 4}]
DROPLESS = SCHEMES[:3]
KEY = jax.random.key(11)


def moe(kind="topk_softmax", expert=PAIRS, **options):
  shared = options.pop("shared", None)
  return MoEConfig(EXPERTS, PER_TOKEN, expert, RouterConfig(kind, **options),
                   shared)


GPT_OSS = moe(bias=True)


@pytest.fixture
def small_rounds(monkeypatch):
  """So few tokens would fit into one round."""
  monkeypatch.setattr(dispatch, "LEAST_ROWS", 1)


@functools.cache
def inputs(config, batch=BATCH, length=LENGTH):
  """(params, x, cotangent): every parameter matters, none is zero."""
  random = np.random.default_rng(5)
  def normal(shape, scale=1.0):
    return jnp.array(random.normal(size=shape, scale=scale), jnp.float32)
  shape = batch, length, D_MODEL
  abstract = jax.eval_shape(lambda key: nn.unbox(MoE(
      config, 1.0, "ragged").init(key, jnp.zeros(shape))), KEY)["params"]
  params = jax.tree.map(lambda leaf: normal(leaf.shape, 0.5), abstract)
  return params, normal(shape), normal(shape)


def layer(config, params, x, scheme="auto", key=KEY, **options):
  """"ragged", of the matmuls, is quick to compile."""
  return MoE(config, 1.0, "ragged", scheme, **options).apply(
      {"params": params}, x, key)


@functools.partial(jax.jit, static_argnums=(0, 4),
                   static_argnames=("capacity_factor", "fsdp"))
def everything(config, params, x, dy, scheme="auto", **options):
  """Values, the report, and gradients of all that training may minimise."""
  def loss(params, x):
    y, output = layer(config, params, x, scheme, **options)
    weighted = (sum(output.losses.values()) if output.losses else 0)
    return jnp.sum(y * dy) + 3 * weighted, (y, output)
  (_, found), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
      params, x)
  return found, gradients


@functools.cache
def on_one_device(config):
  return everything(config, *inputs(config))


def assert_same(found, expected, tolerance=2e-6):
  for (path, a), b in zip(jax.tree.leaves_with_path(found),
                          jax.tree.leaves(expected), strict=True):
    assert np.max(np.abs(a - b)) <= tolerance * max(
        np.max(np.abs(b)), 1e-3), jax.tree_util.keystr(path)


def on(sizes):
  return jax.set_mesh(mesh.make_mesh(sizes))


@pytest.mark.parametrize("scheme", DROPLESS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_values_gradients_and_statistics_are_those_of_one_device(sizes,
                                                                 scheme):
  with on(sizes):
    found = everything(GPT_OSS, *inputs(GPT_OSS), scheme)
  assert_same(found, on_one_device(GPT_OSS))
  assert found[0][1].dropped == 0
  losses = found[0][1].losses
  assert losses["sequence"] > 1.01 * losses["switch"]  # it is another number


@pytest.mark.parametrize("config, sizes, scheme", [
    (moe("softmax_topk", HALVES, renormalize=True), MESHES[1], "gather"),
    (moe("softmax_topk", HALVES), MESHES[3], "ragged_all_to_all"),
    (moe("softmax_topk", MLPConfig(D_EXPERT, "relu", gated=False)), MESHES[3],
     "all_to_all"),
    (moe("noisy_topk", shared=MLPConfig(6, "gelu", gated=False)), MESHES[3],
     "all_to_all"),
    (moe("sigmoid_topk", HALVES, balance_bias=True, num_groups=4,
         groups_per_token=2), MESHES[4], "ragged_all_to_all"),
    (moe("expert_choice"), MESHES[3], "auto"),
    (moe("expert_choice", HALVES), MESHES[4], "gather")])
def test_every_kind_of_router_and_expert(config, sizes, scheme):
  with on(sizes):
    found = everything(config, *inputs(config), scheme)
  assert_same(found, on_one_device(config))


@pytest.mark.parametrize("scheme", DROPLESS)
def test_nothing_is_dropped_when_all_tokens_go_to_one_device(scheme):
  params, x, dy = inputs(GPT_OSS)
  bias = 100.0 * (jnp.arange(EXPERTS) // 2 == 5) + 50.0 * (
      jnp.arange(EXPERTS) == 1)
  params = {**params, "router_bias": bias}
  expected = everything(GPT_OSS, params, x, dy)
  with on(MESHES[0]):
    found = everything(GPT_OSS, params, x, dy, scheme)
  assert found[0][1].load_E[10] == found[0][1].load_E[11] == np.float32(1 / 3)
  # Sums of as many terms are rounded otherwise.
  assert_same(found, expected, 5e-6)


def counted_drops(params, x, shards, capacity):
  """Rows without room, first choices of a device before its second ones."""
  logits = router_inputs(GPT_OSS.router, {
      "router": params["router"], "bias": params["router_bias"]},
      x.reshape(-1, D_MODEL))["logits_TE"]
  chosen = np.asarray(choose(GPT_OSS, logits)[0])
  kept = np.zeros(chosen.shape, bool)
  for tokens in np.split(np.arange(len(chosen)), shards):
    room = np.full(EXPERTS, capacity)
    for choice in range(PER_TOKEN):
      for token in tokens:
        kept[token, choice] = room[chosen[token, choice]] > 0
        room[chosen[token, choice]] -= 1
  return logits, chosen, kept


@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[3]], ids=str)
def test_capacity_drops_what_has_no_room_and_says_how_much(sizes):
  params, x, dy = inputs(GPT_OSS)
  shards = 8 // sizes.get("tensor", 1)
  rows = BATCH * LENGTH * PER_TOKEN // shards
  capacity = -(-rows // EXPERTS)
  logits, chosen, kept = counted_drops(params, x, shards, capacity)
  assert 0.05 < np.mean(~kept) < 0.5
  with on(sizes):
    (y, output), _ = everything(GPT_OSS, params, x, dy, "capacity",
                                capacity_factor=1.0)
  np.testing.assert_allclose(output.dropped, np.mean(~kept), rtol=1e-6)
  # A dropped row changes its token alone, so the others are right.
  whole = np.all(kept, 1)
  expected = on_one_device(GPT_OSS)[0]
  np.testing.assert_allclose(
      np.asarray(y).reshape(-1, D_MODEL)[whole],
      np.asarray(expected[0]).reshape(-1, D_MODEL)[whole], atol=1e-5)
  assert np.min(np.max(np.abs(y - expected[0]), -1).reshape(-1)[~whole]) > 1e-3
  assert_same(output._replace(dropped=0), expected[1]._replace(dropped=0))


def test_with_enough_capacity_nothing_is_dropped():
  with on(MESHES[3]):
    found = everything(GPT_OSS, *inputs(GPT_OSS), "capacity",
                       capacity_factor=float(EXPERTS))
  assert_same(found, on_one_device(GPT_OSS))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_experts_are_split_whole(scheme):
  params, x, _ = inputs(GPT_OSS)
  params = {**params, **{name: Int8.quantize(np.asarray(params[name]))
                         for name in ("gate_up", "down")}}
  run = jax.jit(lambda params, x, scheme: MoE(
      GPT_OSS, 1.0, "xla", scheme, 16.0, fsdp=False).apply(
          {"params": params}, x), static_argnums=2)
  expected = run(params, x, "gather")
  with on(MESHES[3]):
    assert_same(run(params, x, scheme), expected)


@pytest.mark.parametrize("fsdp", [True, False])
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 5), (2, 4)])
def test_tokens_that_do_not_divide_are_on_all_devices(batch, length, fsdp):
  params, x, dy = inputs(GPT_OSS, batch, length)
  expected = everything(GPT_OSS, params, x, dy)
  with on({"expert": 2, "data": 2, "context": 2}):
    assert_same(everything(GPT_OSS, params, x, dy, fsdp=fsdp), expected)


def test_rows_that_arrived_may_be_kept(primitives):
  params, x, dy = inputs(GPT_OSS)

  def exchanges(remat):
    def output(params, x):
      return layer(GPT_OSS, params, x, "ragged_all_to_all")[0]
    if remat != "none":
      output = jax.checkpoint(output, policy=REMAT_POLICIES[remat])
    return primitives(jax.grad(lambda params, x: jnp.sum(
        jnp.sin(output(params, x) + x) * dy), (0, 1)), params, x)[
            "ragged_all_to_all"]

  with on(MESHES[0]):
    # There and back, and gradients there and back.
    assert exchanges("full") == exchanges("none") + 1
    assert exchanges("arrived") == exchanges("none")
