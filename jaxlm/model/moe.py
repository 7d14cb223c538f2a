"""The expert layer: route, gather rows by expert, two matmuls, combine."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import MoEConfig
from jaxlm.model.layers import fan_in, weight
from jaxlm.model.mlp import MLP, activate, mlp_weights
from jaxlm.model.routing import Routing, RouterOutput, route
from pallas_kernels.quant import is_quantized
from pallas_kernels.expert_matmul import expert_matmul


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
def combine(y_MD, weight_M, token_M, row_TA):
  """Each token's rows, weighted and summed in float32, in y's dtype."""
  weighted = y_MD[row_TA] * weight_M[row_TA][..., None]
  return jnp.sum(weighted, 1).astype(y_MD.dtype)


def _combine_forward(y_MD, weight_M, token_M, row_TA):
  return combine(y_MD, weight_M, token_M, row_TA), (y_MD, weight_M, token_M)


def _combine_backward(residuals, dx_TD):
  y_MD, weight_M, token_M = residuals
  dx_MD = dx_TD[token_M].astype(jnp.float32)
  return ((dx_MD * weight_M[:, None]).astype(y_MD.dtype),
          jnp.sum(dx_MD * y_MD, -1), None, None)


combine.defvjp(_combine_forward, _combine_backward)


def experts(x_TD, routing: Routing, weights, config: MoEConfig,
            implementation: str = "auto"):
  """The weighted sum of each token's experts, [T, D].

  `weights` are (first [E, D, 2F], its bias, down [E, F, D], its bias) as
  `mlp_weights` gives them.
  """
  first, first_bias, down, down_bias = weights
  token_M, weight_M, sizes_E, row_TA = routing
  x_MD = (x_TD[token_M] if row_TA is None
          else dispatch(x_TD, token_M, row_TA))
  h_MF = _matmul(x_MD, first, sizes_E, first_bias, implementation)
  y_MD = _matmul(activate(h_MF, config.expert), down, sizes_E, down_bias,
                 implementation)
  if row_TA is not None:
    return combine(y_MD, weight_M, token_M, row_TA)
  total_TD = jax.ops.segment_sum(y_MD * weight_M[:, None], token_M,
                                 x_TD.shape[0])
  return total_TD.astype(x_TD.dtype)


def _matmul(x_MD, weights, sizes_E, bias_EF, implementation):
  """Each row by its expert's weights, an array or a quantized leaf."""
  dtype = x_MD.dtype
  if bias_EF is not None:
    bias_EF = bias_EF.astype(dtype)
  if is_quantized(weights) and len(x_MD) < len(sizes_E):
    return _few_rows(x_MD, weights, sizes_E, bias_EF)
  return expert_matmul(x_MD, weights.astype(dtype), sizes_E, bias=bias_EF,
                       implementation=implementation)


def _few_rows(x_MD, weights, sizes_E, bias_EF):
  """Dequantizes the experts of these rows alone: decode has few."""
  expert_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(x_MD)),
                              side="right")
  y_MF = jnp.einsum("MD,MDF->MF", x_MD, weights[expert_M].astype(x_MD.dtype),
                    preferred_element_type=jnp.float32)
  if bias_EF is not None:
    y_MF += bias_EF[expert_M]
  return y_MF.astype(x_MD.dtype)


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
    axes, zeros = ("embed", "expert"), nn.initializers.zeros
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
