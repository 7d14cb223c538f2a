"""Matmuls of rows sorted by expert with their expert's weights."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.expert_matmul import blocked, ragged

IMPLEMENTATIONS = {"blocked": blocked, "ragged": ragged}


def expert_matmul(x_MD, weights_EDF, group_sizes_E, *, bias_EF=None,
                  implementation: str = "auto"):
  """Multiplies each row by the weights of its expert.

  Args:
    x_MD: rows sorted by expert, floating point.
    weights_EDF: one matrix an expert, of x's dtype.
    group_sizes_E: int32, how many rows each expert has; zeros are fine. Rows
      past their sum give zero.
    bias_EF: added to each row of its expert.
    implementation: "blocked" (cost follows the rows on every platform; the
      CPU's), "ragged" (`jax.lax.ragged_dot`) or "auto", which follows the
      platform compiled for.

  Returns:
    [M, F] of x's dtype, summed in float32. Differentiable in x, weights and
    bias.

  Raises:
    ValueError: shapes, dtypes or the implementation do not fit.
  """
  _validate(x_MD, weights_EDF, group_sizes_E, bias_EF, implementation)
  return _expert_matmul(implementation, x_MD, weights_EDF,
                        group_sizes_E, bias_EF)


def _validate(x_MD, weights_EDF, group_sizes_E, bias_EF, implementation):
  if x_MD.ndim != 2 or weights_EDF.ndim != 3:
    raise ValueError(f"x {x_MD.shape} and weights {weights_EDF.shape}: "
                     "expected [M, D] and [E, D, F]")
  if 0 in (*x_MD.shape, *weights_EDF.shape):
    raise ValueError(f"x {x_MD.shape} and weights {weights_EDF.shape}: "
                     "nothing to multiply")
  num_experts, dim_in, dim_out = weights_EDF.shape
  if x_MD.shape[1] != dim_in:
    raise ValueError(f"x {x_MD.shape} has rows of {x_MD.shape[1]}, weights "
                     f"{weights_EDF.shape} take rows of {dim_in}")
  if group_sizes_E.shape != (num_experts,):
    raise ValueError(f"group_sizes {group_sizes_E.shape}: expected one size "
                     f"for each of the {num_experts} experts")
  if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
    raise ValueError(f"group_sizes are {group_sizes_E.dtype}: expected int32")
  if bias_EF is not None and bias_EF.shape != (num_experts, dim_out):
    raise ValueError(f"bias {bias_EF.shape}: expected "
                     f"{(num_experts, dim_out)}")
  dtypes = {a.dtype for a in (x_MD, weights_EDF)}
  if len(dtypes) > 1 or not jnp.issubdtype(x_MD.dtype, jnp.floating):
    raise ValueError(f"x is {x_MD.dtype} and weights are {weights_EDF.dtype}: "
                     "cast both to one floating-point dtype")
  if implementation not in ("auto", *IMPLEMENTATIONS):
    raise ValueError(f"implementation={implementation!r}: use one of "
                     f"{('auto', *IMPLEMENTATIONS)}")


def _run(implementation: str, function: str, *args, **kwargs):
  if implementation != "auto":
    return getattr(IMPLEMENTATIONS[implementation], function)(*args, **kwargs)
  return lax.platform_dependent(
      *args, cpu=functools.partial(getattr(blocked, function), **kwargs),
      default=functools.partial(getattr(ragged, function), **kwargs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_matmul(implementation, x_MD, weights_EDF, group_sizes_E, bias_EF):
  return _run(implementation, "matmul", x_MD, weights_EDF, group_sizes_E,
              bias_EF)


def _forward(implementation, x_MD, weights_EDF, group_sizes_E, bias_EF):
  y_MF = _expert_matmul(implementation, x_MD, weights_EDF, group_sizes_E,
                        bias_EF)
  return y_MF, (x_MD, weights_EDF, group_sizes_E, bias_EF)


def _backward(implementation, residuals, dy_MF):
  x_MD, weights_EDF, group_sizes_E, bias_EF = residuals
  dx_MD = _run(implementation, "matmul", dy_MF, weights_EDF, group_sizes_E,
               transposed=True)
  dw_EDF, db_EF = _run(implementation, "weight_gradient", x_MD, dy_MF,
                       group_sizes_E, with_bias=bias_EF is not None)
  if db_EF is not None:
    db_EF = db_EF.astype(bias_EF.dtype)
  return dx_MD, dw_EDF.astype(weights_EDF.dtype), None, db_EF


_expert_matmul.defvjp(_forward, _backward)
