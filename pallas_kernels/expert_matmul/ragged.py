"""Expert matmuls by `jax.lax.ragged_dot`, for accelerators."""
import jax
import jax.numpy as jnp
from jax import lax


def _row_expert(group_sizes_E, num_rows: int):
  """The expert of each row (the number of experts past the last group)."""
  return jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(num_rows),
                          side="right")


def matmul(x_MD, weights, group_sizes_E, bias_EF=None, *, transposed=False):
  """[M, D] by [E, D, F] ([E, F, D] if transposed) to [M, F]."""
  dims = lax.RaggedDotDimensionNumbers(
      (((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
  y_MF = lax.ragged_dot_general(x_MD, weights, group_sizes_E, dims,
                                preferred_element_type=jnp.float32)
  if bias_EF is not None:
    expert = _row_expert(group_sizes_E, x_MD.shape[0])
    y_MF += bias_EF.at[expert].get(mode="fill", fill_value=0)
  return y_MF.astype(x_MD.dtype)


def weight_gradient(x_MD, dy_MF, group_sizes_E, with_bias: bool):
  """The gradients of weights [E, D, F] and bias [E, F] (or None), float32."""
  dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  dw_EDF = lax.ragged_dot_general(x_MD, dy_MF, group_sizes_E, dims,
                                  preferred_element_type=jnp.float32)
  if not with_bias:
    return dw_EDF, None
  expert = _row_expert(group_sizes_E, x_MD.shape[0])
  return dw_EDF, jax.ops.segment_sum(
      dy_MF.astype(jnp.float32), expert, group_sizes_E.shape[0],
      indices_are_sorted=True)
