"""Matmuls of tokens by weights whose rows or columns are split over `tensor`.

Weights that are split over the batch's axes are gathered here, in the dtype
they are used in, so that their gradients are scattered in it as they are
summed.
"""
import jax.numpy as jnp
from jax import lax

from jaxlm.parallel import mesh
from pallas_kernels import vma

TOKENS = ("batch", "length")


def columns(x_BTD, weights, fsdp: bool):
  """Of weights [D, ...], each with its logical axes, the products [B, T, ...].

  x's gradient is summed over `tensor` once, for all of them.
  """
  dtype = x_BTD.dtype
  arrays, axes = [w.astype(dtype) for w, _ in weights], [a for _, a in weights]

  def local(x_BTD, *arrays):
    arrays = [mesh.gather(w, 0, a[0], fsdp) for w, a in zip(arrays, axes)]
    x_BTD = vma.vary(x_BTD, vma.varying(arrays))
    return [jnp.einsum("BTD,D...->BT...", x_BTD, w) for w in arrays]

  if mesh.current() is None:
    return [jnp.einsum("BTD,D...->BT...", x_BTD, w) for w in arrays]
  return mesh.manual(
      local, (mesh.spec(*TOKENS, None),
              *(mesh.spec(*a, fsdp=fsdp) for a in axes)),
      [mesh.spec(*TOKENS, *a[1:]) for a in axes])(x_BTD, *arrays)


def rows(o_BTNH, w_NHD, fsdp: bool):
  """Heads [B, T, N, H] to [B, T, D], by a weight [N, H, D]."""
  w_NHD = w_NHD.astype(o_BTNH.dtype)
  if mesh.current() is None:
    return _flat_matmul(o_BTNH, w_NHD)

  def local(o_BTNH, w_NHD):
    w_NHD = mesh.gather(w_NHD, 2, "embed", fsdp)
    return lax.psum(_flat_matmul(o_BTNH, w_NHD), mesh.RULES["heads"])

  return mesh.manual(
      local, (mesh.spec(*TOKENS, "heads", None),
              mesh.spec("heads", None, "embed", fsdp=fsdp)),
      mesh.spec(*TOKENS, None))(o_BTNH, w_NHD)


def _flat_matmul(o_BTNH, w_NHD):
  # Of two contracted axes XLA may change the order, and to that end copies
  # the whole weight at every step of decoding; of one it cannot.
  return (o_BTNH.reshape(*o_BTNH.shape[:2], -1)
          @ w_NHD.reshape(-1, w_NHD.shape[-1]))
