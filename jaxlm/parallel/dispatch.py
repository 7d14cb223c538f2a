"""How tokens get to the devices of their experts, and results back.

gather: every device gets all tokens of its `expert` neighbours, computes its
  experts' rows, and what each token got is summed and handed back.
all_to_all: rows go to their experts in blocks of one size.
ragged_all_to_all: rows go as they are, without padding.
capacity: GShard's (arXiv 2006.16668): a device sends an expert so many rows
  and drops the rest, last choices first.

The first three drop nothing. They run in rounds (`rounds`), of which the first
has room for a quarter more than an equal share and is all there is while the
experts are balanced to that degree. If everything goes to one device there
are as many more rounds as it takes, in the same memory.
"""
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import MoEConfig
from jaxlm.model.experts import combine, dispatch
from jaxlm.model.routing import sort, sort_by_expert
from jaxlm.parallel import exchange, mesh
from jaxlm.parallel.exchange import AXIS
from jaxlm.parallel.rounds import sum_of_rounds
from jaxlm.parallel.schemes import SCHEMES, SHARES, choose_scheme
from pallas_kernels import platforms
from pallas_kernels.quant import is_quantized

# Names the rows that arrived at their experts.
ARRIVED = "arrived"
# Rows that a round has room for at least.
LEAST_ROWS = 512


class Plan(typing.NamedTuple):
  """All that is known before any token is.

  shards: devices that experts are split over, among those that exchange.
  columns: sets of such devices that have the same tokens but other experts.
  local: experts of a device.
  split: whether the devices that exchange have different tokens.
  size: rows of a round ("gather", "ragged_all_to_all"), of a block
    ("all_to_all"), or of an expert ("capacity").
  most: rounds there can be.
  compute: (rows, rows of each expert, row weights, weights) to results.
  """
  scheme: str
  shards: int
  columns: int
  local: int
  split: bool
  size: int
  most: int
  compute: typing.Callable

  @property
  def num_experts(self) -> int:
    return self.shards * self.local


def plan(config: MoEConfig, scheme: str, num_tokens: int, *, split: bool,
         columns: int, capacity_factor: float, compute) -> Plan:
  """Of `num_tokens` tokens a device.

  Raises:
    ValueError: the scheme is unknown or cannot serve this router.
  """
  shards = mesh.axis_size(AXIS)
  if scheme not in ("auto", *SCHEMES):
    raise ValueError(f"dispatch={scheme!r}: use one of {('auto', *SCHEMES)}")
  chosen_by_experts = config.router.kind == "expert_choice"
  if chosen_by_experts and scheme not in ("auto", "gather"):
    raise ValueError(f"dispatch={scheme!r}: experts that choose their tokens "
                     "see the whole batch: use 'gather' or 'auto'")
  if not split or shards == 1 or chosen_by_experts:
    scheme = "gather"
  if scheme == "auto":
    scheme = choose_scheme(
        num_tokens, config.experts_per_token, shards,
        platform=platforms.platform(), generation=platforms.tpu_generation())
  local = config.num_experts // shards // columns
  rows = num_tokens * config.experts_per_token
  most_rows = num_tokens * (local if chosen_by_experts else min(
      config.experts_per_token, local))
  match scheme:
    case "all_to_all":
      least, rows = LEAST_ROWS // shards, rows / shards
    case "capacity":
      size = math.ceil(capacity_factor * rows / config.num_experts)
      return Plan(scheme, shards, columns, local, split, size, 1, compute)
    case _:
      least = LEAST_ROWS
      if split:
        most_rows *= shards
  size = min(most_rows, max(least, 8 * math.ceil(SHARES * rows / 8)))
  return Plan(scheme, shards, columns, local, split, size,
              -(-most_rows // size), compute)


def run(x_TD, expert_TA, weight_TA, weights, plan: Plan):
  """Each token's experts, summed: [T, D], to be summed over `tensor`, and
  over `expert` where all its devices have these tokens."""
  routing = sort_by_expert(
      _in_column(expert_TA, plan), weight_TA, plan.num_experts,
      first_choices_first=plan.scheme == "capacity")
  counts_SE = routing.group_sizes_E[None]
  if plan.split:
    counts_SE = lax.all_gather(routing.group_sizes_E, AXIS)
  return _SCHEMES[plan.scheme](x_TD, routing, counts_SE, weights, plan)


def _in_column(expert_TA, plan: Plan):
  """Numbers of the experts of this device's column; past the last one for
  those of others."""
  if plan.columns == 1:
    return expert_TA
  block_TA, local_TA = jnp.divmod(expert_TA, plan.local)
  shard_TA, column_TA = jnp.divmod(block_TA, plan.columns)
  return jnp.where(column_TA == lax.axis_index("tensor"),
                   shard_TA * plan.local + local_TA, plan.num_experts)


def run_chosen(x_TD, token_LC, weight_LC, weights, plan: Plan):
  """The same where each of this device's experts has chosen tokens of all
  that its neighbours have; an index past these is none of them."""
  if plan.split:
    x_TD = lax.all_gather(x_TD, AXIS, tiled=True)
  expert_LC = jnp.where(token_LC < len(x_TD),
                        jnp.arange(plan.local)[:, None], plan.local)
  order_M, _, sizes_L = sort(expert_LC.reshape(-1), plan.local)
  return _summed(x_TD, token_LC.reshape(-1)[order_M],
                 weight_LC.reshape(-1)[order_M],
                 exchange.in_line(sizes_L[None], 1), weights, plan)


def _gather(x_TD, routing, counts_SE, weights, plan: Plan):
  x_STD, token_SM, weight_SM = (
      lax.all_gather(x, AXIS) if plan.split else x[None]
      for x in (x_TD, routing.token_M, routing.weight_M))
  sources, tokens, dim = x_STD.shape
  token_SM += tokens * jnp.arange(sources)[:, None]
  parts = exchange.in_line(counts_SE, plan.shards).of_shard(
      lax.axis_index(AXIS), plan.shards)
  # Sources' rows stand one after the other too.
  first_SL = parts.first_SE + jnp.arange(sources)[:, None] * len(
      routing.token_M)
  return _summed(x_STD.reshape(-1, dim), token_SM.reshape(-1),
                 weight_SM.reshape(-1), parts._replace(first_SE=first_SL),
                 weights, plan)


def _summed(x_TD, token_M, weight_M, parts, weights, plan: Plan):
  """Of tokens of all sources: each source's sums, from all destinations."""
  def one_round(i, floats, others):
    (x_TD, weight_M, weights), (token_M, parts, quantized) = floats, others
    first, place, size = exchange.window(parts, i * plan.size, plan.size)
    index_C = exchange.relocate(jnp.arange(plan.size), place.T, first.T,
                                size.T, missing=len(token_M))
    token_C = token_M.at[index_C].get(mode="fill", fill_value=len(x_TD))
    weight_C = weight_M.at[index_C].get(mode="fill", fill_value=0)
    y_CD = plan.compute(_rows(x_TD, token_C), jnp.sum(size, 0), weight_C,
                        _together(weights, quantized))
    return jax.ops.segment_sum(y_CD.astype(jnp.float32), token_C, len(x_TD))

  weights, quantized = _apart(weights)
  y_TD = sum_of_rounds(
      one_round, -(-jnp.sum(parts.size_SE) // plan.size),
      (x_TD, weight_M, weights), (token_M, parts, quantized),
      plan.most).astype(x_TD.dtype)
  if not plan.split:
    return y_TD
  return lax.psum_scatter(y_TD, AXIS, scatter_dimension=0, tiled=True)


@jax.custom_vjp
def _rows(x_TD, token_C):
  """Rows of x, zeros past its end. Their gradients are summed in float32."""
  return x_TD.at[token_C].get(mode="fill", fill_value=0)


def _rows_backward(residuals, dy_CD):
  num_tokens, token_C = residuals
  return jax.ops.segment_sum(dy_CD.astype(jnp.float32), token_C,
                             num_tokens).astype(dy_CD.dtype), None


_rows.defvjp(lambda x_TD, token_C: (_rows(x_TD, token_C),
                                    (len(x_TD), token_C)), _rows_backward)


def _exchanged(x_TD, routing, weights, plan: Plan, rounds, parts, by):
  """`by` gives, of round i and the parts, what `exchange.by_slots` does."""
  x_MD = dispatch(x_TD, routing.token_M, routing.row_TA)

  def one_round(i, floats, others):
    (x_MD, weight_M, weights), (parts, quantized) = floats, others
    there, back, sizes_L = by(i, parts)
    x_RD, weight_R = checkpoint_name(there(x_MD, weight_M), ARRIVED)
    y_RD = plan.compute(x_RD, sizes_L, weight_R, _together(weights, quantized))
    return back(y_RD, len(x_MD))

  weights, quantized = _apart(weights)
  y_MD = sum_of_rounds(one_round, rounds, (x_MD, routing.weight_M, weights),
                       (parts, quantized), plan.most)
  return combine(y_MD, routing.token_M, routing.row_TA)


def _ragged_all_to_all(x_TD, routing, counts_SE, weights, plan: Plan):
  rows_D = jnp.sum(_of_shards(counts_SE, plan), 0)
  return _in_windows(x_TD, routing, weights, plan, jnp.max(rows_D),
                     exchange.in_line(counts_SE, plan.shards),
                     exchange.by_slices)


def _all_to_all(x_TD, routing, counts_SE, weights, plan: Plan):
  rows_SD = _of_shards(counts_SE, plan)
  return _in_windows(x_TD, routing, weights, plan, jnp.max(rows_SD),
                     exchange.in_blocks(counts_SE, plan.shards),
                     exchange.by_slots)


def _in_windows(x_TD, routing, weights, plan: Plan, places, parts, by):
  """Exchanges what goes to so many places, a round's after a round's."""
  return _exchanged(
      x_TD, routing, weights, plan, _agreed(-(-places // plan.size)), parts,
      lambda i, parts: by(exchange.window(parts, i * plan.size, plan.size),
                          plan.size))


def _capacity(x_TD, routing, counts_SE, weights, plan: Plan):
  return _exchanged(
      x_TD, routing, weights, plan, 1,
      exchange.in_capacity(counts_SE, plan.size, plan.shards),
      lambda i, parts: exchange.by_slots(parts, plan.local * plan.size))


_SCHEMES = {"gather": _gather, "all_to_all": _all_to_all,
            "ragged_all_to_all": _ragged_all_to_all, "capacity": _capacity}


def _of_shards(counts_SE, plan: Plan):
  """Rows of each source for each destination."""
  return jnp.sum(counts_SE.reshape(-1, plan.shards, plan.local), -1)


def _agreed(rounds):
  """As many as any device needs: all take part in every exchange."""
  return lax.pmax(rounds, ("data", "context", AXIS, "tensor"))


def _apart(weights):
  """Weights that a gradient is taken of, and those that are quantized."""
  return (tuple(None if is_quantized(w) else w for w in weights),
          tuple(w if is_quantized(w) else None for w in weights))


def _together(weights, quantized):
  return tuple(w if q is None else q
               for w, q in zip(weights, quantized, strict=True))
