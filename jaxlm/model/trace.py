"""What happens inside a forward pass: whom routers choose, where queries look.

The model runs as it always does; Linen's interceptors look at what its methods
are given and give back.
"""
import collections
from collections.abc import Collection
import dataclasses
import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model.attention import Attention
from jaxlm.model.mla import MLA, expand
from jaxlm.model.moe import MoE
from jaxlm.model.routing import choose, expert_choice, router_inputs
from jaxlm.model.transformer import Execution, Layer, Output, forward
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
  """Runs `forward` (see there), layer by layer, and tells what it saw.

  Args:
    parts: what to look at, of "experts", "attention" and "hidden".

  Raises:
    ValueError: an unknown part, or as `forward` does.
  """
  if unknown := set(parts) - set(PARTS):
    raise ValueError(f"parts={tuple(parts)}: {sorted(unknown)} are none of "
                     f"{PARTS}")
  # In a scan or under remat what is seen inside could not get out.
  execution = dataclasses.replace(execution, scan_layers=False, remat="none")
  return _trace(config, frozenset(parts), execution, params,
                jnp.asarray(tokens_BT), positions_BT, segment_ids_BT)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _trace(config, parts, execution, params, tokens_BT, positions_BT,
           segment_ids_BT):
  seen = collections.defaultdict(list)

  def look(method, args, kwargs, context):
    result, module = method(*args, **kwargs), context.module
    match module, context.method_name:
      case MoE(), "__call__" if "experts" in parts:
        found = _choices(module, *args[:1])
      case Attention() | MLA(), "attend" if "attention" in parts:
        found = _masses(module, *args)
      case Layer(), "__call__" if "hidden" in parts:
        found = {"hidden_LBTD": result[0]}
      case _:
        found = {}
    for name, x in found.items():
      seen[name].append(x)
    return result

  with nn.intercept_methods(look):
    output = forward(config, params, tokens_BT, execution=execution,
                     positions_BT=positions_BT, segment_ids_BT=segment_ids_BT)
  return Trace(output=output, **{
      name: jnp.stack(seen[name]) if name in seen else None
      for name in Trace._fields if name != "output"})


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
