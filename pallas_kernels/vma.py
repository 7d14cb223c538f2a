"""Operations inside `jax.shard_map`: the mesh axes that arrays vary over.

Loops, branches, kernels and `custom_vjp`s want these to agree: what starts as
zeros, say, with what is added to it. Outside of it nothing varies, and these
functions change nothing.
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
    new = tuple(sorted(set(axes) - varying(x)))
    return jax.lax.pcast(x, new, to="varying") if new else x
  return jax.tree.map(visit, tree)


def like(tree, *others):
  """The same arrays, varying over whatever they and the others vary over."""
  return vary(tree, varying(tree, *others))


def aligned(*trees):
  """All of them, varying over whatever one of them varies over."""
  axes = varying(*trees)
  return tuple(vary(tree, axes) for tree in trees)


def zeros(shape, dtype, like):
  """Zeros that a loop may carry, varying as `like`, a tree, does."""
  return vary(jnp.zeros(shape, dtype), varying(like))


def shape_like(tree, shape, dtype=None):
  """The shape of a kernel's output that varies as its arguments, a tree, do;
  by default of the first one's dtype."""
  first = jax.tree.leaves(tree)[0]
  kind = type(jax.typeof(first).manual_axis_type)
  return jax.ShapeDtypeStruct(shape, dtype or first.dtype,
                              manual_axis_type=kind(varying=varying(tree)))
