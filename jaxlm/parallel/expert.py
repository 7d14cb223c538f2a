"""The expert layer under a mesh: tokens meet their experts, none dropped.

Experts are split over the axis `expert`, tokens over `data`, `context` and
`expert`. Each device routes its own tokens; what is said of the batch (loads,
balancing losses) is of all of it. `dispatch` brings tokens to experts and
back. With several devices on `tensor` each has a part of every expert's inner
dimension, and its results are a part of a sum; or, where matrices are
quantized, it has whole experts, and the results are those of some rows.
"""
import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxlm.config import MLPConfig, MoEConfig
from jaxlm.model import experts, routing
from jaxlm.parallel import dispatch, mesh
from jaxlm.parallel.exchange import AXIS
from pallas_kernels import vma
from pallas_kernels.quant import is_quantized


def layer(config: MoEConfig, x_BTD, router: dict, weights, key, *,
          implementation: str = "auto", scheme: str = "auto",
          capacity_factor: float = 1.25, fsdp: bool = True, fp8: bool = False):
  """What one device would compute, whatever the mesh that is set.

  Args:
    x_BTD: of the whole batch. Where B or T does not divide over its axes, as
      in decoding, all devices of these have all tokens.
    router: its weights, as `routing.router_inputs` takes them.
    weights: the experts', as `mlp_weights` gives them.
    key: draws noisy top-k's noise; None while not training.
    scheme: one of `schemes.SCHEMES`, or "auto".
    fp8: as in `experts.of_rows`.

  Returns:
    y_BTD, and the `RouterOutput` of the whole batch.

  Raises:
    ValueError: weights do not divide over the mesh, or the scheme is unknown
      or cannot serve this router.
  """
  batch = mesh.whole_shape(x_BTD.shape[:2], "batch", "length")
  split = _token_axes(*batch)
  tokens = P(*split, None)
  split = frozenset(split[0] + split[1])
  laid_out = _lay_out(weights, config.expert, x_BTD.dtype, fsdp)
  plan = dispatch.plan(
      config, scheme, math.prod(batch) // mesh.axis_size(*split),
      split=AXIS in split, capacity_factor=capacity_factor,
      columns=mesh.axis_size("tensor") if laid_out.whole else 1,
      compute=functools.partial(experts.of_rows, expert=config.expert,
                                implementation=implementation, fp8=fp8))
  noise_BTE = routing.draw_noise(config, key, (*batch, config.num_experts))

  def local(x_BTD, noise_BTE, router, weights):
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    if noise_BTE is not None:
      noise_BTE = noise_BTE.reshape(-1, config.num_experts)
    inputs = routing.router_inputs(config.router, router, x_TD)
    if config.router.kind == "expert_choice":
      choice, sums = _expert_choice(config, inputs, x_BTD.shape[:2], plan,
                                    split)
      run, noisy_TE = dispatch.run_chosen, None
    else:
      choice, sums, noisy_TE = _token_choice(
          config, inputs, noise_BTE, len(x_BTD), plan, split)
      run = dispatch.run
    # From here on all differs from device to device, so that gradients are
    # summed here, where they are smallest. Stages have other layers' tokens.
    axes = (split | vma.varying(weights) | {AXIS, "tensor"}) - {"stage"}
    x_TD, choice, weights = vma.vary((x_TD, choice, weights), axes)
    y_TD = run(x_TD, *choice, laid_out.used(weights), plan)
    y_TD, noisy = jax.tree.map(
        lambda x: x.reshape(*x_BTD.shape[:2], -1),
        (_settle(y_TD, split, axes), noisy_TE))
    return y_TD, lax.psum(sums, _in_order(split)), noisy

  y_BTD, sums, noisy = mesh.manual(
      local, (tokens, tokens, P(), laid_out.specs), (tokens, P(), tokens))(
          x_BTD, noise_BTE, router, laid_out.arrays)
  if noise_BTE is not None:
    # Not by each device: some versions of jax know no erf there.
    sums = sums._replace(smooth_load_E=routing.smooth_load(
        *noisy, config.experts_per_token))
  return y_BTD, routing.report(config, sums, math.prod(batch))


def _token_axes(num_sequences: int, length: int):
  """Axes over which the batch and its sequences are split."""
  batch = next(axes for axes in (mesh.RULES["batch"], ("data",), ())
               if num_sequences % mesh.axis_size(*axes) == 0)
  context = mesh.RULES["length"]
  return batch, context if length % mesh.axis_size(*context) == 0 else ()


def _token_choice(config, inputs, noise_TE, num_sequences: int,
                  plan: dispatch.Plan, split):
  """Who goes where, of a device's own tokens, sums for the report and, where
  there is noise, what smooth loads are of."""
  clean_TE = logits_TE = inputs["logits_TE"]
  scale_TE = inputs.get("noise_scale_TE")
  if noise_TE is not None:
    logits_TE = clean_TE + noise_TE * scale_TE
  expert_TA, weight_TA = routing.choose(config, logits_TE,
                                        inputs.get("balance_bias_E"))
  hit_TAE = expert_TA[..., None] == jnp.arange(config.num_experts)
  rows_BE = routing.count_rows(expert_TA, num_sequences, config.num_experts)
  rows_E = jnp.sum(rows_BE, 0)
  importance_E = jnp.sum(jnp.where(hit_TAE, weight_TA[..., None], 0), (0, 1))
  taken = jnp.float32(len(logits_TE))
  if plan.scheme == "capacity":
    taken = jnp.sum(jnp.minimum(rows_E, plan.size)) / config.experts_per_token
  noisy_TE = None
  if noise_TE is not None:
    noisy_TE = clean_TE, logits_TE, scale_TE
  # A device may have but a part of its sequences.
  rows_BE = lax.psum(rows_BE, tuple(name for name in mesh.RULES["length"]
                                    if name in split))
  return ((expert_TA, weight_TA),
          routing.sum_up(config, logits_TE, rows_E, importance_E, taken,
                         rows_BE),
          noisy_TE)


def _expert_choice(config, inputs, shape, plan: dispatch.Plan, split):
  """What this device's experts chose of the whole batch, as places among the
  tokens of its neighbours on `expert`, and sums for the report."""
  logits_TE, (sequences, length) = inputs["logits_TE"], shape
  batch = tuple(name for name in mesh.RULES["batch"] if name in split)
  context = tuple(name for name in mesh.RULES["length"] if name in split)
  logits_BTE = logits_TE.reshape(*shape, -1)
  if batch:
    logits_BTE = lax.all_gather(logits_BTE, batch, axis=0, tiled=True)
  if context:
    logits_BTE = lax.all_gather(logits_BTE, context, axis=1, tiled=True)
  chosen = routing.expert_choice(config, logits_BTE.reshape(
      -1, config.num_experts))
  token_EC, weight_EC = (x.reshape(config.num_experts, -1)
                         for x in (chosen.token_M, chosen.weight_M))
  # All devices find the same, and these are summed.
  share = 1 / mesh.axis_size(*split)
  taken_T = jnp.zeros(logits_BTE.size // config.num_experts).at[
      chosen.token_M].set(1)
  sums = routing.sum_up(config, logits_TE, chosen.group_sizes_E * share,
                        jnp.sum(weight_EC, 1) * share,
                        jnp.sum(taken_T) * share)
  neighbours = sequences * (plan.shards if plan.split else 1)
  first = lax.axis_index("data") * neighbours if "data" in split else 0
  sequence, place = jnp.divmod(token_EC, logits_BTE.shape[1])
  sequence -= first
  if context:
    place -= lax.axis_index(context) * length
  inside = ((sequence >= 0) & (sequence < neighbours)
            & (place >= 0) & (place < length))
  token_EC = jnp.where(inside, sequence * length + place, neighbours * length)
  block = lax.axis_index(AXIS) * plan.columns
  if plan.columns > 1:
    block += lax.axis_index("tensor")
  return tuple(lax.dynamic_slice_in_dim(x_EC, block * plan.local, plan.local)
               for x_EC in (token_EC, weight_EC)), sums


def _settle(y_TD, split: frozenset, axes: frozenset):
  """The same on all devices that have the same tokens."""
  parts = {"tensor", AXIS} - split
  copies = axes - split - parts
  if copies:
    first = functools.reduce(jnp.logical_and, (lax.axis_index(name) == 0
                                               for name in sorted(copies)))
    y_TD = jnp.where(first, y_TD, 0)
  return lax.psum(y_TD, _in_order(parts | copies))


def _in_order(axes: frozenset) -> tuple[str, ...]:
  """A set's own order is another in each process, all of which have to ask
  for the same exchange."""
  return tuple(name for name in mesh.AXES if name in axes)


class _LaidOut(typing.NamedTuple):
  """Experts' weights as they enter `manual`, and how they are split.

  whole: matrices are, experts over `expert` and `tensor` together.
  gathered: where they are used, along axis 1 and axis 2.
  """
  arrays: tuple
  specs: tuple
  whole: bool
  gathered: bool

  def used(self, weights):
    """The weights of this device's experts, inside `manual`."""
    first, first_bias, down, down_bias = weights
    if self.whole:
      return weights
    if self.gathered:
      first = mesh.gather(first, 1, "expert_embed")
      down = mesh.gather(down, 2, "expert_embed")
    first = first.reshape(*first.shape[:2], -1)
    if first_bias is not None:
      first_bias = first_bias.reshape(len(first_bias), -1)
      # Of the parts of a sum, one has the bias.
      down_bias = jnp.where(lax.axis_index("tensor") == 0, down_bias, 0)
    return first, first_bias, down, down_bias


def _lay_out(weights, config: MLPConfig, dtype, fsdp: bool) -> _LaidOut:
  first, first_bias, down, down_bias = weights
  name = "gate_up" if config.gated else "up"
  names = name, name + "_bias", "down", "down_bias"
  whole = is_quantized(first) or is_quantized(down)
  if whole:
    axes = [("whole_expert", None, None), ("whole_expert", None)] * 2
  else:
    first, down = first.astype(dtype), down.astype(dtype)
    inner = ("mlp",)
    if config.gated and not config.interleaved and mesh.axis_size(
        "tensor") > 1:
      # Each device wants its part of either half.
      inner = (None, "mlp")
      first, first_bias = (
          None if x is None else x.reshape(*x.shape[:-1], 2, -1)
          for x in (first, first_bias))
    axes = [("expert", "expert_embed", *inner), ("expert", *inner),
            ("expert", "mlp", "expert_embed"), ("expert", None)]
  arrays = first, first_bias, down, down_bias
  specs = []
  for what, x, of_x in zip(names, arrays, axes, strict=True):
    if x is not None and not mesh.in_hand():
      mesh.check_divides(what, x.shape, of_x, mesh.current(), fsdp)
    # A quantized leaf's arrays have its experts in front.
    specs.append(mesh.spec(*of_x[:1] if is_quantized(x) else of_x, fsdp=fsdp))
  gathered = mesh.axis_size(*mesh.rules(fsdp)["expert_embed"] or ()) > 1
  return _LaidOut(arrays, tuple(specs), whole, gathered)
