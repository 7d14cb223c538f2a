"""Expert matmuls by `jax.lax.ragged_dot`, for accelerators."""
import jax.numpy as jnp
from jax import lax

from pallas_kernels.expert_matmul import reference
from pallas_kernels.quant import is_quantized


def unsupported(x_MD, weights, options) -> str | None:
  if is_quantized(weights):
    return f"weights are {type(weights).__name__}; it takes arrays"


def _matmul(x_MD, weights, group_sizes_E, transposed=False):
  dims = lax.RaggedDotDimensionNumbers(
      (((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
  return lax.ragged_dot_general(x_MD, weights, group_sizes_E, dims,
                                preferred_element_type=jnp.float32)


def matmul(x_MD, weights, group_sizes_E, bias_EF, row_weights_M, options):
  y_MF = _matmul(x_MD, weights, group_sizes_E)
  if bias_EF is not None:
    expert = reference.row_expert(group_sizes_E, x_MD.shape[0])
    y_MF += bias_EF.at[expert].get(mode="fill", fill_value=0)
  return reference.finish(y_MF, row_weights_M,
                          swiglu_limit=options.swiglu_limit).astype(x_MD.dtype)


def input_gradient(dy_MF, weights, group_sizes_E, options):
  return _matmul(dy_MF, weights, group_sizes_E, True).astype(dy_MF.dtype)


def weight_gradient(x_MD, dy_MF, group_sizes_E, with_bias, options):
  dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  dw_EDF = lax.ragged_dot_general(x_MD, dy_MF, group_sizes_E, dims,
                                  preferred_element_type=jnp.float32)
  return dw_EDF, (reference.bias_gradient(dy_MF, group_sizes_E) if with_bias
                  else None)
