"""What happens inside a forward pass: whom routers choose, where queries look.

The model runs as it always does; Linen's interceptors look at what its methods
are given and give back.
"""
import collections
from collections.abc import Collection
import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model.attention import Attention
from jaxlm.model.layers import Norm
from jaxlm.model.mla import MLA, expand
from jaxlm.model.moe import MoE
from jaxlm.model.routing import choose, expert_choice, router_inputs
from jaxlm.model.transformer import (Embedding, Execution, Layer, Output,
                                     make_context, per_layer)
from pallas_kernels.windowed_attention import windowed_attention

PARTS = ("experts", "attention", "hidden")


class Trace(typing.NamedTuple):
  """What was seen of a batch; None for what was not asked for or is not there.

  Of the expert layers alone, in order:
    expert_LBTA, weight_LBTA: each token's experts, the best first, int32, and
      their weights, float32. Under expert choice A is all experts: those that
      took the token, then `num_experts` with weight 0.
  Of all layers:
    first_key_LBTN: the share of its attention that each query gives the first
      key of its row, by head; 0 where it cannot see it.
    sink_LBTN: what goes to the head's sink, if there are sinks.
    hidden_LBTD: hidden states after the layer.
  output: the model's.
  """
  expert_LBTA: jax.Array | None
  weight_LBTA: jax.Array | None
  first_key_LBTN: jax.Array | None
  sink_LBTN: jax.Array | None
  hidden_LBTD: jax.Array | None
  output: Output


def trace(config: ModelConfig, params: dict, tokens_BT, *,
          parts: Collection[str] = ("experts",),
          execution: Execution = Execution(), positions_BT=None,
          segment_ids_BT=None) -> Trace:
  """Does what `forward` does, layer by layer, and tells what it saw.

  Args: as of `forward`, and
    parts: what to look at, of "experts", "attention" and "hidden".

  Raises:
    ValueError: an unknown part, or as `forward` does.
  """
  if unknown := set(parts) - set(PARTS):
    raise ValueError(f"parts={tuple(parts)}: {sorted(unknown)} are none of "
                     f"{PARTS}")
  params = per_layer(config, params)
  context = make_context(config, jnp.asarray(tokens_BT), positions_BT,
                         segment_ids_BT)
  x_BTD = Embedding(config, execution).apply(
      {"params": params["embed"]}, jnp.asarray(tokens_BT), context)
  seen, routers = collections.defaultdict(list), []
  for index, kind in enumerate(config.layers):
    x_BTD, router, found = _layer(config, kind, execution, frozenset(parts),
                                  params["layers"][str(index)], x_BTD, context)
    if router is not None:
      routers.append(router)
    for name, x in found.items():
      seen[name].append(x)
  hidden_BTD = Norm(config.norm).apply({"params": params["final_norm"]}, x_BTD)
  router = jax.tree.map(lambda *x: jnp.stack(x), *routers) if routers else None
  return Trace(output=Output(hidden_BTD, router), **{
      name: jnp.stack(seen[name]) if name in seen else None
      for name in Trace._fields if name != "output"})


# By itself, so that layers of one kind share a program: the program of a whole
# model takes long to compile.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _layer(config, kind, execution, parts, params, x_BTD, context):
  """The layer's hidden states, its router's report, and what was seen."""
  found = {}

  def look(method, args, kwargs, intercepted):
    result = method(*args, **kwargs)
    match intercepted.module, intercepted.method_name:
      case MoE() as moe, "__call__" if "experts" in parts:
        found.update(_choices(moe, args[0]))
      case Attention() | MLA() as attention, "attend" if "attention" in parts:
        found.update(_masses(attention, *args))
    return result

  with nn.intercept_methods(look):
    # The index draws dropout alone.
    x_BTD, router, _ = Layer(config, kind, execution).apply(
        {"params": params}, x_BTD, 0, context)
  if "hidden" in parts:
    found["hidden_LBTD"] = x_BTD
  return x_BTD, router, found


def _choices(moe: MoE, x_BTD) -> dict[str, jax.Array]:
  config = moe.config
  x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
  inputs = router_inputs(config.router, moe.router_weights(x_TD.shape[-1]),
                         x_TD)
  if config.router.kind == "expert_choice":
    expert_TA, weight_TA = _takers(config, inputs["logits_TE"])
  else:
    expert_TA, weight_TA = choose(config, inputs["logits_TE"],
                                  inputs.get("balance_bias_E"))
  shape = (*x_BTD.shape[:2], -1)
  return {"expert_LBTA": expert_TA.reshape(shape),
          "weight_LBTA": weight_TA.reshape(shape)}


def _takers(config, logits_TE):
  """Expert choice as lists of tokens' experts, the heaviest first."""
  num_experts, routing = config.num_experts, expert_choice(config, logits_TE)
  expert_M = jnp.repeat(jnp.arange(num_experts), routing.group_sizes_E,
                        total_repeat_length=len(routing.token_M))
  weight_TE = jnp.full(logits_TE.shape, -1.0).at[
      routing.token_M, expert_M].set(routing.weight_M)
  weight_TE, expert_TE = jax.lax.top_k(weight_TE, num_experts)
  taken_TE = weight_TE >= 0
  return (jnp.where(taken_TE, expert_TE, num_experts),
          jnp.where(taken_TE, weight_TE, 0))


def _masses(module, *args) -> dict[str, jax.Array]:
  """Attention over values that say whether a key is the first (0), and that it
  is one (1): it sums up to what the first got, and to what all keys got."""
  if isinstance(module, MLA):
    q_nope, q_rope, *latents, k_proj, v_proj, segment_ids_BT = args
    q = jnp.concatenate([q_nope, q_rope], -1)
    k, _ = expand(latents, (k_proj, v_proj))
    sinks = window = soft_cap = None
    scale = module.config.query_scale
  else:
    q, k, _, sinks, segment_ids_BT, options = args
    window, scale, soft_cap = options[:3]
  first_S = jnp.arange(k.shape[1]) == 0
  v_S2 = jnp.stack([first_S, jnp.ones_like(first_S)], -1).astype(jnp.float32)
  mass_BTN2 = windowed_attention(
      q.astype(jnp.float32), k.astype(jnp.float32),
      jnp.broadcast_to(v_S2[:, None], (*k.shape[:3], 2)), window=window,
      scale=scale, sinks_N=sinks, soft_cap=soft_cap,
      segment_ids=segment_ids_BT, implementation="xla")
  found = {"first_key_LBTN": mass_BTN2[..., 0]}
  if sinks is not None:
    found["sink_LBTN"] = 1 - mass_BTN2[..., 1]
  return found
