"""Matmuls of rows sorted by expert with their expert's weights."""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import choice, platforms, vma
from pallas_kernels.expert_matmul import gpu, ragged, reference, tpu, xla
from pallas_kernels.expert_matmul.options import Options
from pallas_kernels.quant import is_quantized

# Each has unsupported(), matmul(), input_gradient() and weight_gradient(), as
# in xla.py.
IMPLEMENTATIONS = {"xla": xla, "ragged": ragged, "pallas-tpu": tpu,
                   "pallas-gpu": gpu}
# What "auto" takes the first supported one of, by platform, before "xla".
PREFERRED = {"tpu": ("pallas-tpu", "ragged"), "gpu": ("pallas-gpu", "ragged")}


def expert_matmul(x_MD, weights, group_sizes_E, *, bias=None,
                  swiglu_limit: float | None = None, row_weights_M=None,
                  implementation: str = "auto", blocks=None, interpret=False):
  """Multiplies each row by the weights of its expert.

  Args:
    x_MD: rows sorted by expert, floating point.
    weights: one matrix an expert, [E, D, F]: an array of x's dtype, or a
      quantized leaf (`pallas_kernels.quant`), which is dequantized as it is
      multiplied.
    group_sizes_E: int32, how many rows each expert has; zeros are fine. Rows
      past their sum give zero.
    bias: [E, F], added to each row of its expert.
    swiglu_limit: if given, gpt-oss's clamped SwiGLU of columns 0, 2, 4 ...
      (gate) and 1, 3, 5 ... (up) follows, and the result has F / 2 columns.
    row_weights_M: multiplies each row of the result, bias included.
    implementation: "xla" (a loop whose cost follows the rows, on every
      platform; the CPU's), "ragged" (`jax.lax.ragged_dot`), "pallas-tpu",
      "pallas-gpu", or "auto": the best one that the platform compiled for
      supports.
    blocks: sizes of a Pallas implementation's blocks; None takes those found
      best for the device compiled for.
    interpret: runs a Pallas implementation in Pallas's interpreter, on any
      platform: True, or `pltpu.InterpretParams`.

  Returns:
    [M, F] or [M, F / 2], of x's dtype, summed in float32. Differentiable in
    x, row weights and bias, and in weights that are an array.

  Raises:
    ValueError: shapes, dtypes or the implementation do not fit.
    NotImplementedError: the implementation named does not support these.
  """
  _validate(x_MD, weights, group_sizes_E, bias, swiglu_limit, row_weights_M)
  options = Options(swiglu_limit, blocks, interpret)
  name = choice.choose(IMPLEMENTATIONS,
                       PREFERRED.get(platforms.platform(), ()), implementation,
                       (x_MD, weights, options))
  args = x_MD, weights, group_sizes_E, bias, row_weights_M
  return _expert_matmul(name, implementation == "auto", options,
                        *vma.like(args))


def unsupported(implementation: str, x_MD, weights, *, swiglu_limit=None,
                blocks=None) -> str | None:
  """Why an implementation cannot do this; None if it can."""
  return IMPLEMENTATIONS[implementation].unsupported(
      x_MD, weights, Options(swiglu_limit, blocks))


def _validate(x_MD, weights, group_sizes_E, bias, swiglu_limit, row_weights_M):
  if x_MD.ndim != 2 or weights.ndim != 3:
    raise ValueError(f"x {x_MD.shape} and weights {weights.shape}: "
                     "expected [M, D] and [E, D, F]")
  if 0 in (*x_MD.shape, *weights.shape):
    raise ValueError(f"x {x_MD.shape} and weights {weights.shape}: "
                     "nothing to multiply")
  num_experts, dim_in, dim_out = weights.shape
  if x_MD.shape[1] != dim_in:
    raise ValueError(f"x {x_MD.shape} has rows of {x_MD.shape[1]}, weights "
                     f"{weights.shape} take rows of {dim_in}")
  if group_sizes_E.shape != (num_experts,):
    raise ValueError(f"group_sizes {group_sizes_E.shape}: expected one size "
                     f"for each of the {num_experts} experts")
  if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
    raise ValueError(f"group_sizes are {group_sizes_E.dtype}: expected int32")
  if bias is not None and bias.shape != (num_experts, dim_out):
    raise ValueError(f"bias {bias.shape}: expected {(num_experts, dim_out)}")
  if row_weights_M is not None and row_weights_M.shape != x_MD.shape[:1]:
    raise ValueError(f"row_weights {row_weights_M.shape}: expected one for "
                     f"each of {x_MD.shape[0]} rows")
  if swiglu_limit is not None and (dim_out % 2 or swiglu_limit <= 0):
    raise ValueError(f"swiglu_limit={swiglu_limit} and {dim_out} columns: "
                     "expected a positive limit and pairs of gate and up")
  if not jnp.issubdtype(x_MD.dtype, jnp.floating) or not (
      is_quantized(weights) or weights.dtype == x_MD.dtype):
    raise ValueError(f"x is {x_MD.dtype} and weights are {weights.dtype}: "
                     "cast both to one floating-point dtype")


_run = functools.partial(choice.run, IMPLEMENTATIONS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _expert_matmul(name, auto, options, *args):
  return _run("matmul", name, auto, *args, options=options)


def _forward(name, auto, options, *args):
  if options.swiglu_limit is None:
    return _expert_matmul(name, auto, options, *args), (args, None)
  # What SwiGLU is of is kept: its gradient would need the matmul again.
  *matmul_args, row_weights_M = args
  h_MF = _run("matmul", name, auto, *matmul_args, None,
              options=options._replace(swiglu_limit=None))
  return reference.finish(h_MF, row_weights_M,
                          swiglu_limit=options.swiglu_limit), (args, h_MF)


def _backward(name, auto, options, residuals, dy):
  (x_MD, weights, group_sizes_E, bias, row_weights_M), h_MF = residuals
  options, limit = options._replace(swiglu_limit=None), options.swiglu_limit
  drow_weights_M = dweights = dbias = None
  if limit is not None:
    _, vjp = jax.vjp(functools.partial(reference.finish, swiglu_limit=limit),
                     h_MF, row_weights_M)
    dy, drow_weights_M = vjp(dy)
  dx_MD = _run("input_gradient", name, auto, dy, weights, group_sizes_E,
               options=options)
  if limit is None and row_weights_M is not None:
    drow_weights_M = _row_weights_gradient(x_MD, dx_MD, dy, group_sizes_E,
                                           bias).astype(row_weights_M.dtype)
    dx_MD, dy = (reference.finish(g, row_weights_M) for g in (dx_MD, dy))
  if is_quantized(weights):
    if bias is not None:
      dbias = reference.bias_gradient(dy, group_sizes_E)
  else:
    dweights, dbias = _run("weight_gradient", name, auto, x_MD, dy,
                           group_sizes_E, with_bias=bias is not None,
                           options=options)
    dweights = dweights.astype(weights.dtype)
  if bias is not None:
    dbias = dbias.astype(bias.dtype)
  return dx_MD, dweights, None, dbias, drow_weights_M


def _row_weights_gradient(x_MD, dx_MD, dy_MF, group_sizes_E, bias_EF):
  """dy (x W + bias) of each row, by dx = dy W^T of no weight: without the
  matmul again, nor its result kept."""
  total_M = jnp.sum(dx_MD.astype(jnp.float32) * x_MD, -1)
  if bias_EF is not None:
    expert_M = reference.row_expert(group_sizes_E, len(x_MD))
    bias_MF = bias_EF.at[expert_M].get(mode="fill", fill_value=0)
    total_M += jnp.sum(dy_MF.astype(jnp.float32) * bias_MF, -1)
  return total_M


_expert_matmul.defvjp(_forward, _backward)
