"""Feed-forward networks: dense ones, and what an expert computes."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import MLPConfig
from jaxlm.model.layers import fan_in, weight
from jaxlm.parallel import linear, mesh
from pallas_kernels.expert_matmul.reference import (clamped_swiglu,
                                                     deinterleave)

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def activate(h, config: MLPConfig):
  """[..., 2F] (gate and up) or, not gated, [..., F] to [..., F]."""
  if not config.gated:
    return ACTIVATIONS[config.activation](h)
  if config.interleaved:
    gate, up = deinterleave(h)
  else:
    gate, up = jnp.split(h, 2, -1)
  return _gated(gate, up, config)


def _gated(gate, up, config: MLPConfig):
  if config.activation == "clamped_swiglu":
    return clamped_swiglu(gate, up, config.swiglu_limit)
  return ACTIVATIONS[config.activation](gate) * up


def mlp_weights(module: nn.Module, config: MLPConfig, d_model: int,
                residual_scale: float, experts: tuple[int, ...] = ()):
  """The weights of one network, or with `experts=(E,)` of E of them.

  Returns (first [D, 2F or F], its bias, down [F, D], its bias), each with a
  leading E if asked for; biases are None without `bias`. The first is called
  `gate_up` when gated, `up` otherwise.
  """
  e_axis = ("expert",) * len(experts)
  embed = "expert_embed" if experts else "embed"
  width = config.d_ff * (2 if config.gated else 1)
  name = "gate_up" if config.gated else "up"
  first = weight(module, name, (*experts, d_model, width),
                 (*e_axis, embed, "mlp"), fan_in())
  down = weight(module, "down", (*experts, config.d_ff, d_model),
                (*e_axis, "mlp", embed), fan_in(residual_scale))
  if not config.bias:
    return first, None, down, None
  zeros = nn.initializers.zeros
  return (first,
          weight(module, name + "_bias", (*experts, width),
                 (*e_axis, "mlp"), zeros),
          down,
          weight(module, "down_bias", (*experts, d_model),
                 (*e_axis, "norm"), zeros))


class MLP(nn.Module):
  config: MLPConfig
  residual_scale: float
  fsdp: bool = True
  fp8: bool = False

  @nn.compact
  def __call__(self, x_BTD):
    config, dtype = self.config, x_BTD.dtype
    first, first_bias, down, down_bias = mlp_weights(
        self, config, x_BTD.shape[-1], self.residual_scale)
    axes = "embed", "mlp"
    # Of gates and of what they gate each device of `tensor` wants its part, not
    # columns of one of both. Weights that are gathered are put in that order
    # before; where they are resident, h is.
    halves = (self.fsdp and config.gated and not config.interleaved
              and mesh.axis_size("tensor") > 1)
    if halves:
      axes = "embed", None, "mlp"
      first, first_bias = (None if x is None else
                           x.reshape(*x.shape[:-1], 2, config.d_ff)
                           for x in (first, first_bias))
    h, = linear.columns(x_BTD, [(first, axes)], self.fsdp, self.fp8)
    if first_bias is not None:
      h += first_bias.astype(dtype)
    h = (_gated(h[..., 0, :], h[..., 1, :], config) if halves
         else activate(h, config))
    y_BTD = linear.rows(h, down, ("mlp", "embed"), self.fsdp,
                         self.fp8)
    return y_BTD if down_bias is None else y_BTD + down_bias.astype(dtype)
