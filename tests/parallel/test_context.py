"""Attention whose heads, rows and tokens are split over eight devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MLAConfig
from jaxlm.model.mla import MLA, expand
from jaxlm.model.rope import rope_table
from jaxlm.model.transformer import Context
from jaxlm.parallel import context, mesh as mesh_lib
from quick import quick_jit

LENGTH, HEADS, HEAD_DIM = 40, 16, 6
# Mesh, key heads, and options; a device has LENGTH / context tokens.
CASES = {
    "a window within a part": (
        {"context": 8}, 2, dict(window=4, sinks=True)),
    "a window over parts": (
        {"context": 4, "tensor": 2}, 2,
        dict(window=27, sinks=True, segments=True, soft_cap=2.0)),
    "a window of one": ({"context": 8}, 2, dict(window=1, sinks=True)),
    "a ring, segments": (
        {"context": 8}, 2, dict(scheme="ring", segments=True, sinks=True)),
    "a ring of all axes": (
        {"context": 2, "data": 2, "tensor": 2}, 4,
        dict(scheme="ring", sinks=True, soft_cap=2.0)),
    "a ring, as heads do not divide": (
        {"context": 8}, 4, dict(heads=12, sinks=True, segments=True)),
    "heads": ({"context": 4, "tensor": 2}, 8,
              dict(scheme="heads", sinks=True, segments=True)),
    "heads, few of keys": ({"context": 8}, 2, dict(sinks=True, soft_cap=3.0)),
    "no context": ({"data": 2, "expert": 2, "tensor": 2}, 2,
                   dict(window=7, sinks=True, segments=True)),
}


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape),
                     jnp.float32)


def segment_ids(batch):
  """Uneven runs, of ids that are no counts, across the edges of parts."""
  ids = np.random.default_rng(7).choice([-7, 0, 2, 900], (batch, LENGTH))
  return jnp.asarray(np.sort(ids, 1), jnp.int32)


def assert_same(found, expected, tolerance=1.5e-6):
  def compare(path, x, y):
    assert np.abs(x - y).max() < tolerance * np.abs(y).max(), (
        jax.tree_util.keystr(path))
  jax.tree.map_with_path(compare, *jax.tree.map(np.asarray,
                                                (found, expected)))


def everything(function, *args):
  """The output and all gradients, compiled anew under the mesh that is set."""
  def run(args, do):
    y, vjp = jax.vjp(function, *args)
    return y, vjp(do)
  shape = jax.eval_shape(function, *args)
  return quick_jit(run)(args, normal(11, *shape.shape))


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_one_device(name):
  sizes, kv_heads, given = CASES[name]
  given = dict(window=None, scale=0.4) | given
  heads = given.pop("heads", HEADS)
  sinks = normal(4, heads) if given.pop("sinks", False) else None
  segments = segment_ids(4) if given.pop("segments", False) else None
  options = context.Options(**given, implementation="xla")
  run = lambda: everything(
      lambda q, k, v, sinks: context.attention(q, (k, v), (), sinks, segments,
                                               options),
      normal(1, 4, LENGTH, heads, HEAD_DIM),
      normal(2, 4, LENGTH, kv_heads, HEAD_DIM),
      normal(3, 4, LENGTH, kv_heads, 5), sinks)
  with jax.set_mesh(mesh_lib.make_mesh(sizes)):
    found = run()
  assert_same(found, run())


@pytest.mark.parametrize("scheme", ["ring", "heads"])
def test_latents_are_exchanged_rather_than_heads(scheme):
  options = context.Options(None, 0.4, implementation="xla", scheme=scheme,
                            expand=expand)
  run = lambda: everything(
      lambda q, latent, rope, *projections: context.attention(
          q, (latent, rope), projections, None, segment_ids(2), options,
          keys_axes=2 * (("batch", "length", None),),
          weights_axes=2 * ((None, "heads", None),)),
      normal(1, 2, LENGTH, HEADS, 7), normal(2, 2, LENGTH, 9),
      normal(3, 2, LENGTH, 3), normal(4, 9, HEADS, 4), normal(5, 9, HEADS, 5))
  with jax.set_mesh(mesh_lib.make_mesh({"context": 4, "tensor": 2})):
    found = run()
  assert_same(found, run())


def test_latent_attention_and_its_projections():
  config = MLAConfig(4, 10, 8, 6, 12, q_rank=14)
  layer = MLA(config, 0.5, "xla")
  rope = {"full": rope_table(config.rope, config.rope_head_dim,
                             jnp.arange(LENGTH)[None])}
  seen = Context(rope, None, segment_ids(2), None)
  x_BTD = normal(1, 2, LENGTH, 16)
  params = nn.unbox(layer.init(jax.random.key(2), x_BTD, seen)["params"])
  run = lambda: everything(
      lambda params, x: layer.apply({"params": params}, x, seen)[0], params,
      x_BTD)
  with jax.set_mesh(mesh_lib.make_mesh({"context": 2, "data": 2,
                                        "tensor": 2})):
    found = run()
  assert_same(found, run())


def memory_of_ring(parts):
  """Temporary bytes of a device's 256 tokens, for their gradients."""
  options = context.Options(None, 0.4, implementation="xla", scheme="ring")
  x = jax.ShapeDtypeStruct((1, 256 * parts, 2, 32), jnp.float32)

  def run(q, k, v, do):
    return jax.vjp(lambda q, k, v: context.attention(
        q, (k, v), (), None, None, options), q, k, v)[1](do)

  mesh = mesh_lib.make_mesh({"context": parts}, jax.devices()[:parts])
  split = jax.NamedSharding(mesh, mesh_lib.spec("batch", "length"))
  with jax.set_mesh(mesh):
    return quick_jit(run, in_shardings=split, out_shardings=split).lower(
        x, x, x, x).compile().memory_analysis().temp_size_in_bytes


def test_a_rings_memory_is_that_of_a_devices_own_tokens():
  assert memory_of_ring(8) < 1.05 * memory_of_ring(4)
