"""The expert layer: route, gather rows by expert, two matmuls, combine."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import MoEConfig
from jaxlm.model.layers import fan_in, weight
from jaxlm.model.mlp import MLP, activate, mlp_weights
from jaxlm.model.routing import Routing, RouterOutput, route
from pallas_kernels.expert_matmul import expert_matmul
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


def experts(x_TD, routing: Routing, weights, config: MoEConfig,
            implementation: str = "auto"):
  """The weighted sum of each token's experts, [T, D].

  `weights` are (first [E, D, 2F], its bias, down [E, F, D], its bias) as
  `mlp_weights` gives them, matrices in quantized leaves too.
  """
  first, first_bias, down, down_bias = weights
  token_M, weight_M, sizes_E, row_TA = routing
  x_MD = (x_TD[token_M] if row_TA is None
          else dispatch(x_TD, token_M, row_TA))
  matmul = functools.partial(_matmul, sizes_E=sizes_E,
                             implementation=implementation)
  expert = config.expert
  if expert.activation == "clamped_swiglu" and expert.interleaved:
    h_MF = matmul(x_MD, first, first_bias, swiglu_limit=expert.swiglu_limit)
  else:
    h_MF = activate(matmul(x_MD, first, first_bias), expert)
  y_MD = matmul(h_MF, down, down_bias, row_weights_M=weight_M)
  if row_TA is not None:
    return combine(y_MD, token_M, row_TA)
  total_TD = jax.ops.segment_sum(y_MD.astype(jnp.float32), token_M,
                                 x_TD.shape[0])
  return total_TD.astype(x_TD.dtype)


def _matmul(x_MD, weights, bias_EF, *, sizes_E, **options):
  if not is_quantized(weights):
    weights = weights.astype(x_MD.dtype)
  return expert_matmul(x_MD, weights, sizes_E, bias=bias_EF, **options)


class MoE(nn.Module):
  """`noise_key` draws noisy top-k's noise; None while not training."""
  config: MoEConfig
  residual_scale: float
  implementation: str

  @nn.compact
  def __call__(self, x_BTD, noise_key=None) -> tuple[jax.Array, RouterOutput]:
    config, d_model = self.config, x_BTD.shape[-1]
    num_experts = config.num_experts
    x_TD = x_BTD.reshape(-1, d_model)
    routing, output = route(config, **self._router(x_TD), key=noise_key)
    weights = mlp_weights(self, config.expert, d_model, self.residual_scale,
                          (num_experts,))
    y_TD = experts(x_TD, routing, weights, config, self.implementation)
    y_BTD = y_TD.reshape(x_BTD.shape)
    if config.shared is not None:
      y_BTD += MLP(config.shared, self.residual_scale, name="shared")(x_BTD)
    return y_BTD, output

  def _router(self, x_TD) -> dict:
    """Logits in float32, and what else the router's kind needs."""
    config, shape = self.config.router, (x_TD.shape[1], self.config.num_experts)
    x_TD = x_TD.astype(jnp.float32)
    axes, zeros = ("embed", "router"), nn.initializers.zeros
    router = weight(self, "router", shape, axes, fan_in())
    inputs = {"logits_TE": x_TD @ router.astype(jnp.float32)}
    if config.bias:
      inputs["logits_TE"] += weight(self, "router_bias", shape[1:], axes[1:],
                                    zeros).astype(jnp.float32)
    if config.balance_bias:
      inputs["balance_bias_E"] = weight(self, "balance_bias", shape[1:],
                                        axes[1:], zeros)
    if config.kind == "noisy_topk":
      noise = weight(self, "router_noise", shape, axes, zeros)
      inputs["noise_scale_TE"] = jax.nn.softplus(
          x_TD @ noise.astype(jnp.float32))
    return inputs
