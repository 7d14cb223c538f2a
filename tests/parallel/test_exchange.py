"""What travels where, and which way is chosen."""
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from jaxlm.config import MLPConfig, MoEConfig, RouterConfig
from jaxlm.model.moe import MoE
from jaxlm.model.transformer import Execution
from jaxlm.parallel import exchange, mesh
from jaxlm.parallel.rounds import sum_of_rounds
from jaxlm.parallel.schemes import choose_scheme, costs, torus
from pallas_kernels import vma

pytestmark = pytest.mark.usefixtures("quick_compile")

SHARDS, LOCAL, WIDTH = 4, 3, 5
EXPERTS = SHARDS * LOCAL


@pytest.fixture(scope="module")
def counts():
  """Rows of each source for each expert: none, few, many, all of a source."""
  counts = np.random.default_rng(3).integers(0, 6, (SHARDS, EXPERTS))
  counts[1] = 0
  counts[1, 7] = 40
  counts[2, :LOCAL] = 0
  return counts


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def exchanged(kind, start, size, x_SMD, counts_SE):
  """Of each device: what came, with its weights, what came back of its
  double, rows of each expert, and the trip's arrays. A window of rows from
  `start` on."""
  def local(x_SMD, counts_SE):
    x_MD = x_SMD[0]
    if kind == "slices":
      parts = exchange.in_line(counts_SE, SHARDS)
      parts = exchange.window(parts, start, size)
      there, back, sizes = exchange.by_slices(parts, size)
    else:
      parts = exchange.in_blocks(counts_SE, SHARDS)
      parts = exchange.window(parts, start, size)
      there, back, sizes = exchange.by_slots(parts, size)
    me = lax.axis_index(exchange.AXIS)
    trip = exchange.Trip(*(x[me] for x in parts),
                         *(x.reshape(-1) for x in parts.of_shard(me, SHARDS)))
    came, weight_R = there(x_MD, jnp.sin(x_MD[:, 3]))
    return jax.tree.map(lambda x: vma.vary(x[None], ["expert"]), (
        came, weight_R, back(2 * came, len(x_MD)), sizes, trip))
  with_expert = P(exchange.AXIS)
  return mesh.manual(local, (with_expert, P()), with_expert)(x_SMD, counts_SE)


def rows(counts):
  """Each row says its source, expert and number."""
  most = counts.sum(1).max() + 2
  x_SMD = np.full((SHARDS, most, WIDTH), -1.0, np.float32)
  for source in range(SHARDS):
    row = 0
    for expert in range(EXPERTS):
      for number in range(counts[source, expert]):
        x_SMD[source, row] = source, expert, number, row, 1
        row += 1
  return x_SMD


def documented(x_SMD, trip, size):
  """`lax.ragged_all_to_all` as its documentation says it."""
  result = np.zeros((SHARDS, size, x_SMD.shape[2]), np.float32)
  for device in range(SHARDS):
    for i in range(EXPERTS):
      target = i // LOCAL
      start, to, n = (a[device, i] for a in (trip.sent_from, trip.sent_to,
                                             trip.sent))
      # The receiver expects as many.
      assert trip.came[target, device * LOCAL + i % LOCAL] == n
      result[target, to:to + n] = x_SMD[device, start:start + n]
  return result


def mesh_of_four():
  return jax.set_mesh(mesh.make_mesh({"expert": SHARDS}, jax.devices()[:4]))


@pytest.mark.parametrize("kind, size", [("slices", 23), ("slots", 7)])
def test_each_row_comes_once_sorted_and_goes_back(kind, size, counts):
  x_SMD = rows(counts)
  seen, returned = [], np.zeros_like(x_SMD)
  for start in range(0, 7 * size, size):
    with mesh_of_four():
      came, weights, back, sizes, trip = jax.tree.map(np.asarray, exchanged(
          kind, start, size, x_SMD, counts))
    returned += back
    for shard in range(SHARDS):
      total = sizes[shard].sum()
      mine, rest = came[shard, :total], came[shard, total:]
      assert not rest.any() and not weights[shard, total:].any()
      np.testing.assert_array_equal(
          weights[shard, :total].astype(x_SMD.dtype),
          jnp.sin(mine[:, 3]).astype(x_SMD.dtype))
      experts = np.repeat(np.arange(LOCAL) + shard * LOCAL, sizes[shard])
      np.testing.assert_array_equal(mine[:, 1], experts)
      # Sources in order, and their rows.
      order = np.lexsort((mine[:, 3], mine[:, 0], mine[:, 1]))
      np.testing.assert_array_equal(order, np.arange(total))
      seen += [tuple(row) for row in mine]
    if kind == "slices":
      np.testing.assert_array_equal(came, documented(x_SMD, trip, size))
      np.testing.assert_array_equal(back, documented(
          2 * came, exchange.Trip(*trip).back(), x_SMD.shape[1]))
  there = x_SMD[..., 4] == 1
  assert sorted(seen) == sorted(map(tuple, x_SMD[there]))
  np.testing.assert_array_equal(returned, np.where(there[..., None],
                                                   2 * x_SMD, 0))


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_sum_of_rounds_and_its_gradient(rounds):
  def function(i, x, steps):
    return jnp.sin(x * (steps[0] + i))
  x, steps = jnp.linspace(0.3, 1.1, 6), jnp.array([2])

  def found(x, rounds):
    return sum_of_rounds(function, rounds, x, steps, 5)
  def expected(x):
    return sum(function(i, x, steps) for i in range(rounds))

  for a, b in zip(jax.jit(functools.partial(jax.vjp, found))(x, rounds),
                  jax.vjp(expected, x)):
    a, b = (f(jnp.arange(6.0))[0] if callable(f) else f for f in (a, b))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_rule_is_the_arithmetic_of_links():
  # Of gathering: a quarter for each copy on a ring, an eighth on 4 x 4.
  for shards, sides, share in ((1000, (1000,), 1 / 4), (16, (4, 4), 1 / 8),
                               (64, (4, 4, 4), 1 / 21)):
    cost = costs(shards, 1, sides)
    assert cost["ragged_all_to_all"] / cost["gather"] == pytest.approx(
        share, rel=0.07)
    assert cost["all_to_all"] > cost["ragged_all_to_all"]
  assert costs(8, 2)["gather"] == 7
  assert costs(8, 2)["ragged_all_to_all"] == 2 * 7 / 8


@pytest.mark.parametrize("arguments, options, expected", [
    # gpt-oss, Qwen3 and DeepSeek-V3 in training.
    ((4096, 4, 64), dict(platform="tpu", generation="v5p"),
     "ragged_all_to_all"),
    ((4096, 4, 32), dict(platform="tpu", generation="v5p"),
     "ragged_all_to_all"),
    ((4096, 8, 8), dict(platform="tpu", generation="v5e"), "gather"),
    ((4096, 8, 8), dict(platform="gpu"), "ragged_all_to_all"),
    ((4096, 8, 4), dict(platform="tpu", sides=(2, 2)), "gather"),
    ((4096, 8, 64), dict(platform="tpu", sides=(4, 4, 4)),
     "ragged_all_to_all"),
    ((4096, 2, 8), dict(platform="cpu"), "all_to_all"),
    # Decoding.
    ((4, 4, 64), dict(platform="tpu", generation="v5p"), "gather"),
    ((4096, 4, 1), dict(platform="cpu"), "gather")])
def test_the_scheme_that_is_chosen(arguments, options, expected):
  assert choose_scheme(*arguments, **options) == expected


def test_tori():
  assert torus(64, "v5p") == (4, 4, 4)
  assert torus(32, "v5p") == (4, 4, 2)
  assert torus(8, "v5e") == (8,)
  assert torus(64, "v6e") == (16, 4)
  assert torus(1, "v4") == (1,)


def moe(num_experts=8, d_ff=6, kind="topk_softmax"):
  return MoEConfig(num_experts, 2, MLPConfig(d_ff), RouterConfig(kind))


@pytest.mark.parametrize("config, options, message", [
    (moe(num_experts=10), {}, "gate_up: expert=10 does not divide over the "
     "mesh's expert=4: use 1, 2, 5 or 10"),
    (moe(d_ff=5), {}, "gate_up: mlp=5 does not divide over the mesh's "
     "tensor=2"),
    (moe(), dict(dispatch="gshard"), "dispatch='gshard': use one of "
     "('auto', 'gather', 'all_to_all', 'ragged_all_to_all', 'capacity')"),
    (moe(kind="expert_choice"), dict(dispatch="all_to_all"),
     "dispatch='all_to_all': experts that choose their tokens see the whole "
     "batch: use 'gather' or 'auto'")])
def test_what_cannot_be_is_refused(config, options, message):
  module = MoE(config, 1.0, "ragged", **options)
  x = jnp.zeros((4, 2, 8))
  params = jax.eval_shape(lambda key: nn.unbox(module.init(key, x)),
                          jax.random.key(0))
  with jax.set_mesh(mesh.make_mesh({"expert": 4, "tensor": 2})):
    with pytest.raises(ValueError, match=re.escape(message)):
      jax.eval_shape(module.apply, params, x)


@pytest.mark.parametrize("options, message", [
    (dict(dispatch="gshard"), "dispatch='gshard': use one of ('auto', 'ga"),
    (dict(capacity_factor=0), "capacity_factor=0: must be positive")])
def test_execution_knows_the_schemes(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    Execution(**options)


def test_weights_travel_exactly_with_rows_of_few_bits():
  weights = np.random.default_rng(2).normal(size=99).astype(np.float32)
  weights[:2] = 0, 1e-20
  x_MD = jnp.zeros((99, 7), jnp.bfloat16)
  parts = jax.jit(exchange._packed)(x_MD, weights)
  assert parts.dtype == jnp.bfloat16
  np.testing.assert_array_equal(exchange._unpacked(parts[:, 7:]), weights)
