"""What an expert matmul means, in plain jnp: every expert on every row."""
import jax
import jax.numpy as jnp

from pallas_kernels.quant import is_quantized

SWIGLU_ALPHA = 1.702


@jax.custom_vjp
def deinterleave(h):
  """The even and the odd columns."""
  return h[..., ::2], h[..., 1::2]


def _deinterleave_backward(_, gradients):
  # The transpose that autodiff finds pads each half and adds: thrice as slow
  # on a CPU.
  even, _ = gradients
  return (jnp.stack(gradients, -1).reshape(*even.shape[:-1], -1),)


deinterleave.defvjp(lambda h: (deinterleave(h), None), _deinterleave_backward)


def clamped_swiglu(gate, up, limit: float):
  """gpt-oss's SwiGLU: both sides clamped, up shifted by one."""
  gate = jnp.minimum(gate, limit)
  up = jnp.clip(up, -limit, limit)
  return gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


def finish(h_MF, row_weights_M=None, *, swiglu_limit=None):
  """What follows the matmul, computed in float32 and given in h's dtype."""
  y = h_MF.astype(jnp.float32)
  if swiglu_limit is not None:
    y = clamped_swiglu(*deinterleave(y), swiglu_limit)
  if row_weights_M is not None:
    y *= row_weights_M.astype(jnp.float32)[:, None]
  return y.astype(h_MF.dtype)


def row_expert(group_sizes_E, num_rows: int):
  """The expert of each row (the number of experts past the last group)."""
  return jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(num_rows),
                          side="right")


def bias_gradient(dy_MF, group_sizes_E):
  """The sum of each expert's rows, float32 [E, F]."""
  return jax.ops.segment_sum(
      dy_MF.astype(jnp.float32), row_expert(group_sizes_E, len(dy_MF)),
      len(group_sizes_E), indices_are_sorted=True)


def expert_matmul(x_MD, weights, group_sizes_E, bias_EF=None,
                  row_weights_M=None, swiglu_limit=None):
  """Row m times its expert's weights; zero past the last group."""
  if is_quantized(weights):
    weights = weights.dequantize(jnp.float32)
  expert_M = row_expert(group_sizes_E, len(x_MD))
  mine_EM = expert_M == jnp.arange(len(weights))[:, None]
  y_EMF = jnp.einsum("MD,EDF->EMF", x_MD, weights,
                     preferred_element_type=jnp.float32)
  if bias_EF is not None:
    y_EMF += bias_EF[:, None].astype(jnp.float32)
  y_MF = jnp.sum(jnp.where(mine_EM[..., None], y_EMF, 0), 0)
  return finish(y_MF, row_weights_M, swiglu_limit=swiglu_limit).astype(
      x_MD.dtype)
