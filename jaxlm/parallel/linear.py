"""Matmuls of tokens by weights whose rows or columns are split over `tensor`.

Weights that are split over the batch's axes are gathered here, in the dtype
they are used in, so that their gradients are scattered in it as they are
summed.
"""
import jax.numpy as jnp
from jax import lax

from jaxlm.model.simulated import fp8_matmul
from jaxlm.parallel import mesh
from pallas_kernels import vma

TOKENS = ("batch", "length")


def columns(x_BTD, weights, fsdp: bool, fp8: bool = False):
  """Of weights [D, ...], each with its logical axes, the products [B, T, ...].

  x's gradient is summed over `tensor` once, for all of them. `fp8`: as in
  `product`.
  """
  dtype = x_BTD.dtype
  arrays, axes = [w.astype(dtype) for w, _ in weights], [a for _, a in weights]

  def local(x_BTD, *arrays):
    arrays = [mesh.gather(w, 0, a[0], fsdp) for w, a in zip(arrays, axes)]
    x_BTD = vma.vary(x_BTD, vma.varying(arrays))
    return [product(x_BTD, w, fp8) for w in arrays]

  if mesh.current() is None:
    return [product(x_BTD, w, fp8) for w in arrays]
  return mesh.manual(
      local, (mesh.spec(*TOKENS, None),
              *(mesh.spec(*a, fsdp=fsdp) for a in axes)),
      [mesh.spec(*TOKENS, *a[1:]) for a in axes])(x_BTD, *arrays)


def rows(y, weight, axes, fsdp: bool, fp8: bool = False):
  """What is split over `tensor`, [B, T, ...], by a weight [..., D] of logical
  axes `axes`: [B, T, D]."""
  weight = weight.astype(y.dtype)
  if mesh.current() is None:
    return _flat_matmul(y, weight, fp8)

  def local(y, weight):
    weight = mesh.gather(weight, weight.ndim - 1, axes[-1], fsdp)
    return lax.psum(_flat_matmul(y, weight, fp8), mesh.RULES[axes[0]])

  return mesh.manual(
      local, (mesh.spec(*TOKENS, *axes[:-1]), mesh.spec(*axes, fsdp=fsdp)),
      mesh.spec(*TOKENS, None))(y, weight)


def product(x_BTD, w, fp8: bool = False):
  """[B, T, D] by [D, ...]; `fp8`: as `simulated.fp8_matmul` computes it."""
  if not fp8:
    return jnp.einsum("BTD,D...->BT...", x_BTD, w)
  y = fp8_matmul(jnp.matmul, x_BTD, w.reshape(len(w), -1))
  return y.reshape(*x_BTD.shape[:2], *w.shape[1:])


def _flat_matmul(y, weight, fp8):
  # Of two contracted axes XLA may change the order, and to that end copies
  # the whole weight at every step of decoding; of one it cannot.
  y, weight = (y.reshape(*y.shape[:2], -1),
               weight.reshape(-1, weight.shape[-1]))
  return fp8_matmul(jnp.matmul, y, weight) if fp8 else y @ weight
