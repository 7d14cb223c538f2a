"""FLOPs of traced programs against those counted by hand, and those run."""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
import pytest

from jaxlm.parallel.mesh import make_mesh, manual, spec
from jaxlm.plan import flops

ROWS, WIDTH, LAYERS = 24, 16, 5
MATMUL = 2 * ROWS * WIDTH * WIDTH


def count(function, *shapes, num_devices=1, platform="tpu"):
  structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return flops.count(jax.make_jaxpr(function)(*structs), num_devices, platform)


def stack(layer, x, weights):
  return jnp.sum(lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0])


def layer(x, w):
  return jnp.tanh(x @ w)


@pytest.mark.parametrize("remat, passes", [(False, 3), (True, 4)])
def test_a_loop_counts_as_often_as_it_goes_round(remat, passes):
  function = jax.checkpoint(layer) if remat else layer
  gradient = jax.grad(functools.partial(stack, function), (0, 1))
  counted = count(gradient, (ROWS, WIDTH), (LAYERS, WIDTH, WIDTH))
  assert counted.total == passes * LAYERS * MATMUL
  assert not counted.unknown


def test_what_nothing_needs_does_not_count():
  assert count(lambda x, w: (x @ w, w @ w)[0], (ROWS, WIDTH),
               (WIDTH, WIDTH)).total == MATMUL


def test_as_many_as_are_run(executed_flops):
  def function(x, weights):
    return lax.cond(jnp.sum(x) > 0, functools.partial(stack, layer),
                    lambda x, w: jnp.sum(w[0] @ w[1]), x, weights)
  args = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
  assert executed_flops(function, *args) == flops.count(
      jax.make_jaxpr(function)(*args)).total


def test_shard_map_counts_what_each_device_does():
  mesh = make_mesh({"data": 4, "tensor": 2})
  def local(x, w):
    return x @ w  # all of w on each device: nothing is split over `tensor`
  def function(x, w):
    y = manual(local, (spec("batch", None), spec(None, None)),
               spec("batch", None))(x, w)
    return y @ w
  with jax.set_mesh(mesh):
    total = count(function, (ROWS, WIDTH), (WIDTH, WIDTH),
                  num_devices=mesh.size).total
  assert total == MATMUL / 4 + MATMUL / 8


def test_rows_of_groups_meet_one_matrix_each():
  def function(x, w, sizes):
    return jnp.sum(lax.ragged_dot(x, w, sizes.astype(jnp.int32)) ** 2)
  shapes = (ROWS, WIDTH), (3, WIDTH, 2 * WIDTH), (3,)
  assert count(function, *shapes).total == 2 * MATMUL
  assert count(jax.grad(function, (0, 1)), *shapes).total == 6 * MATMUL


def test_branches():
  def platforms(x, w):
    return lax.platform_dependent(x, w, tpu=lambda x, w: x @ w,
                                  default=lambda x, w: x @ w @ w)
  shapes = (ROWS, WIDTH), (WIDTH, WIDTH)
  assert count(platforms, *shapes).total == MATMUL
  assert count(platforms, *shapes, platform="cpu").total == 2 * MATMUL


def test_loops_of_unknown_length_are_named():
  def function(x, w):
    return lax.while_loop(lambda x: x[0, 0] > 0, lambda x: layer(x, w), x)
  shapes = (ROWS, WIDTH), (WIDTH, WIDTH)
  counted = count(function, *shapes)
  assert counted.total == MATMUL
  assert "length depends on data" in counted.unknown.pop()
  assert not count(jax.named_scope("rarely")(function), *shapes).total


@pytest.mark.parametrize("estimate, expected", [
    (None, 3 * 2 * 8 * 128 * 128),
    (pl.CostEstimate(flops=77, bytes_accessed=1, transcendentals=0), 77)])
def test_kernels(estimate, expected):
  def kernel(x_ref, w_ref, o_ref):
    o_ref[...] = x_ref[...] @ w_ref[...]
  def function(x, w):
    return pl.pallas_call(
        kernel, grid=(3,), in_specs=[
            pl.BlockSpec((8, 128), lambda i: (i, 0)),
            pl.BlockSpec((128, 128), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        cost_estimate=estimate, name="mine")(x, w)
  counted = count(function, (24, 128), (128, 128))
  assert counted.kernels == {"mine": expected}
  assert not counted.matmuls
