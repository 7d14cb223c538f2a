"""Operations inside `jax.shard_map`: the mesh axes that arrays vary over.

Outside of it nothing varies, and these functions change nothing.
"""
import jax
import jax.numpy as jnp


def varying(*trees) -> frozenset[str]:
  """The axes over which any array of these may differ between devices."""
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying
                             for x in jax.tree.leaves(trees)))


def vary(tree, axes):
  """The same arrays, which may differ over `axes` too from here on: so their
  gradients are summed over the axes that are new to them, here."""
  def visit(x):
    new = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, new, to="varying") if new else x
  return jax.tree.map(visit, tree)


def aligned(*trees):
  """All of them, varying over whatever one of them varies over: what a
  `custom_vjp`, a kernel or a loop on all of them wants."""
  axes = varying(*trees)
  return tuple(vary(tree, axes) for tree in trees)


def zeros(shape, dtype, like):
  """Zeros that a loop may carry, varying as `like`, an array, does."""
  return vary(jnp.zeros(shape, dtype), varying(like))


def shape_like(x, shape, dtype=None):
  """The shape of a kernel's output that varies as its argument x does."""
  return jax.ShapeDtypeStruct(
      shape, dtype or x.dtype,
      manual_axis_type=jax.typeof(x).manual_axis_type)
