"""Inside `jax.shard_map`, where types say along which axes values may differ.

Loops, branches and kernels want these to agree: what starts as zeros, say,
with what is added to it. Outside, nothing varies and all is as it is.
"""
import jax


def varying(*trees) -> frozenset[str]:
  """The axes of the mesh along which any of these may differ."""
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying
                             for x in jax.tree.leaves(trees)))


def like(tree, *others):
  """The tree, which may differ wherever it or any of the others may. (Its
  gradient is summed here over the axes along which it did not.)"""
  axes = varying(tree, *others)
  def visit(x):
    missing = axes - varying(x)
    return jax.lax.pcast(x, tuple(sorted(missing)),
                         to="varying") if missing else x
  return jax.tree.map(visit, tree) if axes else tree


def result(shape, dtype, *others) -> jax.ShapeDtypeStruct:
  """Shape and dtype of a kernel's result that depends on the others."""
  axes = varying(*others)
  if not axes:
    return jax.ShapeDtypeStruct(shape, dtype)
  kind = next(kind for kind in (jax.typeof(x).manual_axis_type
                                for x in jax.tree.leaves(others))
              if kind.varying)
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kind)(
      varying=axes))
