"""How parameters, optimizer state and caches are split over a mesh."""
import functools

import jax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxlm.config import ModelConfig
from jaxlm.model.transformer import init_variables
from jaxlm.parallel.mesh import named_sharding
from pallas_kernels.quant import is_quantized


@functools.cache
def logical_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
  """The logical axes of each leaf of `init_params`, by its path."""
  boxed = jax.eval_shape(functools.partial(init_variables, config),
                         jax.random.key(0))
  specs = nn.get_partition_spec(boxed)
  return {_name(path): tuple(axes) for path, axes in
          jax.tree.leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P))}


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(config: ModelConfig, tree, mesh, fsdp: bool = True):
  """The sharding of each leaf of a tree that contains parameters: themselves,
  stacked or per layer, or a train state. What is no parameter (a step, a
  count) is whole on each device.

  Matrices of experts in quantized leaves stay whole: their experts are split
  over `expert` and `tensor` together, and so are these experts' biases.

  Args:
    tree: arrays or ShapeDtypeStructs.

  Raises:
    ValueError: a leaf does not divide over the mesh.
  """
  quantized = {_name(path).rpartition("/")[0] for path, leaf in
               jax.tree.leaves_with_path(tree, is_leaf=is_quantized)
               if is_quantized(leaf)}

  def visit(path, leaf):
    name = _name(path)
    return leaf_shardings(config, name, leaf, mesh, fsdp,
                          name.rpartition("/")[0] in quantized)

  return jax.tree.map_with_path(visit, tree, is_leaf=is_quantized)


def leaf_shardings(config: ModelConfig, name: str, leaf, mesh, fsdp: bool,
                   quantized: bool):
  """The shardings of one leaf, called `name`, as in `shardings`.

  Args:
    quantized: the matrices of these experts are.
  """
  axes = _axes_of(config, name)
  if axes is None:
    return jax.tree.map(lambda x: NamedSharding(mesh, P()), leaf)
  if quantized and "expert" in axes:
    return jax.tree.map(lambda x: named_sharding(
        mesh, name, x.shape, ("whole_expert",) + (None,) * (x.ndim - 1),
        fsdp), leaf)
  return named_sharding(mesh, name, leaf.shape, axes, fsdp)


def place(leaf, shardings_):
  """A leaf of numpy arrays on the devices of its shardings, of which each
  process needs its own parts alone."""
  return jax.tree.map(
      lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__),
      leaf, shardings_)


@functools.cache
def _known_axes(config: ModelConfig):
  known = dict(logical_axes(config))
  for name in list(known):
    # stack_0/layer_1/mlp/down is layers/N/mlp/down of a per-layer tree.
    if name.startswith("stack_"):
      known[name.split("/", 2)[2]] = known[name][1:]
  return known


def _axes_of(config: ModelConfig, name: str):
  """By the end of a path, as optimizer states mirror the parameters."""
  known, parts = _known_axes(config), name.split("/")
  return next((known[end] for start in range(len(parts))
               if (end := "/".join(parts[start:])) in known), None)


def with_shardings(tree, shardings_):
  """ShapeDtypeStructs of a tree with their shardings."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
      shardings_)
