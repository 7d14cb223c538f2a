"""The expert layer: a router's weights and experts', on one device or many."""
import flax.linen as nn
import jax

from jaxlm.config import MoEConfig
from jaxlm.model.experts import experts
from jaxlm.model.layers import fan_in, weight
from jaxlm.model.mlp import MLP, mlp_weights
from jaxlm.model.routing import RouterOutput, route, router_inputs
from jaxlm.parallel import expert, mesh


class MoE(nn.Module):
  """`noise_key` draws noisy top-k's noise; None while not training.

  Under a mesh of several devices `dispatch`, `capacity_factor` and `fsdp` say
  how tokens meet experts, see `Execution`; `fp8` simulates it, but for the
  router.
  """
  config: MoEConfig
  residual_scale: float
  implementation: str
  dispatch: str = "auto"
  capacity_factor: float = 1.25
  fsdp: bool = True
  fp8: bool = False

  @nn.compact
  def __call__(self, x_BTD, noise_key=None) -> tuple[jax.Array, RouterOutput]:
    config, d_model = self.config, x_BTD.shape[-1]
    router = self.router_weights(d_model)
    weights = mlp_weights(self, config.expert, d_model, self.residual_scale,
                          (config.num_experts,))
    if mesh.current() is None or mesh.current().size == 1:
      x_TD = x_BTD.reshape(-1, d_model)
      routing, output = route(
          config, **router_inputs(config.router, router, x_TD), key=noise_key,
          num_sequences=len(x_BTD))
      y_BTD = experts(x_TD, routing, weights, config.expert,
                      self.implementation, self.fp8).reshape(x_BTD.shape)
    else:
      y_BTD, output = expert.layer(
          config, x_BTD, router, weights, noise_key,
          implementation=self.implementation, scheme=self.dispatch,
          capacity_factor=self.capacity_factor, fsdp=self.fsdp, fp8=self.fp8)
    if config.shared is not None:
      y_BTD += MLP(config.shared, self.residual_scale, self.fsdp, self.fp8,
                   name="shared")(x_BTD)
    return y_BTD, output

  def router_weights(self, d_model: int) -> dict:
    config, shape = self.config.router, (d_model, self.config.num_experts)
    axes, zeros = ("embed", "router"), nn.initializers.zeros
    router = {"router": weight(self, "router", shape, axes, fan_in())}
    if config.bias:
      router["bias"] = weight(self, "router_bias", shape[1:], axes[1:], zeros)
    if config.balance_bias:
      router["balance_bias"] = weight(self, "balance_bias", shape[1:],
                                      axes[1:], zeros)
    if config.kind == "noisy_topk":
      router["noise"] = weight(self, "router_noise", shape, axes, zeros)
    return router
