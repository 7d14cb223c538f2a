"""What experts compute of rows: gather them, two matmuls, combine."""
import functools

import jax
import jax.numpy as jnp

from jaxlm.config import MLPConfig
from jaxlm.model.mlp import activate
from jaxlm.model.routing import Routing
from jaxlm.model.simulated import fp8_matmul
from pallas_kernels.expert_matmul import expert_matmul
from pallas_kernels.expert_matmul.reference import finish
from pallas_kernels.quant import is_quantized


@jax.custom_vjp
def dispatch(x_TD, token_M, row_TA):
  """The row of each routed token. Its gradient gathers too (no scatter)."""
  return x_TD[token_M]


def _dispatch_forward(x_TD, token_M, row_TA):
  return x_TD[token_M], row_TA


def _dispatch_backward(row_TA, dy_MD):
  dx_TD = jnp.sum(dy_MD[row_TA].astype(jnp.float32), 1)
  return dx_TD.astype(dy_MD.dtype), None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(y_MD, token_M, row_TA):
  """The sum of each token's rows, in float32, in y's dtype. Its gradient
  gathers too."""
  return jnp.sum(y_MD[row_TA].astype(jnp.float32), 1).astype(y_MD.dtype)


def _combine_forward(y_MD, token_M, row_TA):
  return combine(y_MD, token_M, row_TA), token_M


combine.defvjp(_combine_forward,
               lambda token_M, dx_TD: (dx_TD[token_M], None, None))


def experts(x_TD, routing: Routing, weights, expert: MLPConfig,
            implementation: str = "auto", fp8: bool = False):
  """The weighted sum of each token's experts, [T, D]; else as `of_rows`."""
  token_M, weight_M, sizes_E, row_TA = routing
  x_MD = (x_TD[token_M] if row_TA is None
          else dispatch(x_TD, token_M, row_TA))
  y_MD = of_rows(x_MD, sizes_E, weight_M, weights, expert, implementation,
                 fp8)
  if row_TA is not None:
    return combine(y_MD, token_M, row_TA)
  total_TD = jax.ops.segment_sum(y_MD.astype(jnp.float32), token_M,
                                 x_TD.shape[0])
  return total_TD.astype(x_TD.dtype)


def of_rows(x_MD, sizes_E, weight_M, weights, expert: MLPConfig,
            implementation: str = "auto", fp8: bool = False):
  """Each row's expert of it, times the row's weight; zero past the last group.

  `weights` are (first [E, D, 2F], its bias, down [E, F, D], its bias) as
  `mlp_weights` gives them, matrices in quantized leaves too. `fp8`:
  matmuls as `simulated.fp8_matmul` computes them; a bias is part of one, and
  its gradient is the sum of what was rounded.
  """
  first, first_bias, down, down_bias = weights
  matmul = functools.partial(_matmul, sizes_E=sizes_E, fp8=fp8,
                             implementation=implementation)
  if fp8:
    h_MF = activate(matmul(x_MD, first, first_bias), expert)
    return finish(matmul(h_MF, down, down_bias), weight_M)
  if expert.activation == "clamped_swiglu" and expert.interleaved:
    h_MF = matmul(x_MD, first, first_bias, swiglu_limit=expert.swiglu_limit)
  else:
    h_MF = activate(matmul(x_MD, first, first_bias), expert)
  return matmul(h_MF, down, down_bias, row_weights_M=weight_M)


def _matmul(x_MD, weights, bias_EF, *, sizes_E, fp8, **options):
  def matmul(x_MD, weights):
    return expert_matmul(x_MD, weights, sizes_E, bias=bias_EF, **options)

  if not is_quantized(weights):
    weights = weights.astype(x_MD.dtype)
  return fp8_matmul(matmul, x_MD, weights) if fp8 else matmul(x_MD, weights)
