"""What the TPU kernels of windowed attention share."""
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
LOG2_E = math.log2(math.e)
UNSEEN = -1e30  # finite, so that the difference of two is no NaN


def multiply(x, y):
  """A matmul into float32; of float32 as precise as it can be."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.dot(x, y, precision=precision,
                 preferred_element_type=jnp.float32)


def scaled_KH(k_HK, scale):
  """Keys scaled and transposed, once for all query heads: scores then need no
  multiplication and the keys lie as a matmul streams them."""
  return (k_HK.astype(jnp.float32) * scale).T.astype(k_HK.dtype)


def by_head(sinks_N, num_kv_heads, group):
  """The sinks in base 2 as [K, G, 128], which a kernel can read."""
  shape = num_kv_heads, group
  if sinks_N is None:
    return jnp.full((*shape, LANES), UNSEEN, jnp.float32)
  sinks_KG = sinks_N.astype(jnp.float32).reshape(shape) * LOG2_E
  return jnp.broadcast_to(sinks_KG[..., None], (*shape, LANES))


def cost(pairs, matmuls, head_dim, *arrays):
  """Of so many pairs of a query and a key, for the scheduler and planners."""
  return pl.CostEstimate(flops=2 * pairs * matmuls * head_dim,
                         transcendentals=pairs,
                         bytes_accessed=sum(x.nbytes for x in arrays))


def padded(x, length):
  """x with zeros up to `length` on its last axis."""
  missing = max(0, length - x.shape[-1])
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
