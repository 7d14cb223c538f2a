"""Attention split over a TPU slice, compiled for it with its kernels."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxlm
from jaxlm.model.attention import Attention
from jaxlm.model.transformer import make_context
from jaxlm.parallel import mesh as mesh_lib
from jaxlm.plan.devices import parse_slice
from jaxlm.plan.hlo import collectives
from jaxlm.plan.programs import topology_mesh

pytest.importorskip("libtpu", reason="Linux on x86 alone has libtpu")


class Pair(nn.Module):
  """A sliding and a full attention with residuals."""
  config: jaxlm.ModelConfig

  @nn.compact
  def __call__(self, x_BTD, seen):
    for kind in ("sliding", "full"):
      y_BTD, _ = Attention(self.config.attention, kind, self.config.norm, 0.1,
                           "auto", name=kind)(x_BTD, seen)
      x_BTD += y_BTD
    return x_BTD


@pytest.mark.parametrize("topology, sizes", [
    ("v5e:2x4", {"data": 4, "tensor": 2}),
    ("v5p:2x2x2", {"data": 2, "context": 2, "tensor": 2})])
def test_a_pair_of_layers_and_its_gradient(topology, sizes):
  config = jaxlm.preset("gpt-oss-20b")
  mesh = topology_mesh(parse_slice(topology), sizes)
  pair, tokens = Pair(config), jnp.zeros((8, 1024), jnp.int32)

  def spread(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(
        mesh, mesh_lib.spec(*axes)))

  boxed = jax.eval_shape(
      lambda key: pair.init(key, jnp.zeros((1, 1, config.d_model)),
                            make_context(config, tokens[:1, :1]))["params"],
      jax.random.key(0))
  params = jax.tree.map(
      lambda box: spread(box.value.shape, jnp.float32, *box.names), boxed,
      is_leaf=lambda x: isinstance(x, nn.Partitioned))
  x_BTD = spread((*tokens.shape, config.d_model), jnp.bfloat16, "batch",
                 "length", None)

  def loss(params, x_BTD):
    y_BTD = pair.apply({"params": params}, x_BTD, make_context(config, tokens))
    return jnp.sum(y_BTD.astype(jnp.float32))

  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss, (0, 1)), out_shardings=jax.tree.map(
        lambda x: x.sharding, (params, x_BTD))).lower(params, x_BTD)
  assert lowered.as_text().count("@tpu_custom_call") == 4
  found = collectives(lowered.compile().as_text(), dict(mesh.shape))
  assert not [c for c in found if c.degraded]
  large = [c for c in found if c.bytes > 2 ** 18]
  # The gradients of both layers' four weights, over each axis that splits
  # them; the residual stream's, each way, is all that is added up whole.
  split = sum(sizes.get(name, 1) > 1 for name in ("data", "context"))
  assert sum(c.kind == "reduce-scatter" for c in large) == 8 * split
  whole = [c for c in large if c.kind == "all-reduce"]
  assert {c.axes for c in whole} == {("tensor",)} and len(whole) <= 4
  # What a window lacks is 127 keys and values of each sequence and key head.
  halo = [c.bytes for c in found if c.kind == "collective-permute"]
  assert max(halo, default=0) <= 8 // 2 * 127 * 4 * 64 * 2
