"""Which experts a token goes to, with what weights, and how loads balance.

Everything is float32. T here counts the tokens of the whole batch.
"""
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.config import MoEConfig, RouterConfig


# So many rows, decode's, are sorted by comparing each with each.
FEW_ROWS = 512


class Routing(typing.NamedTuple):
  """The routed rows, sorted by expert.

  token_M: the token of each row.    weight_M: its router weight.
  group_sizes_E: rows of each expert (their sum is M).
  row_TA: the row of each token's choices, or None under expert choice, where
    a token has any number of them.
  """
  token_M: jax.Array
  weight_M: jax.Array
  group_sizes_E: jax.Array
  row_TA: jax.Array | None


class RouterOutput(typing.NamedTuple):
  """What one expert layer reports of a batch.

  load_E: share of the routed rows each expert got; sums to 1.
  dropped: share of tokens that no expert took (expert choice alone drops).
  losses: the balancing losses, unweighted (see `balancing_losses`).
  """
  load_E: jax.Array
  dropped: jax.Array
  losses: dict[str, jax.Array]


def route(config: MoEConfig, logits_TE, *, balance_bias_E=None,
          noise_scale_TE=None, key=None) -> tuple[Routing, RouterOutput]:
  """Routes tokens by their router logits, as `config.router` says.

  Args:
    balance_bias_E: added to the scores for the choice alone.
    noise_scale_TE: noisy top-k's softplus(x W_noise).
    key: with it, noisy top-k draws its noise (training); without, it does not.
  """
  logits_TE = logits_TE.astype(jnp.float32)
  if config.router.kind == "expert_choice":
    routing = _expert_choice(config, logits_TE)
    weight_TA = None
  else:
    clean_TE = logits_TE
    if config.router.kind == "noisy_topk" and key is not None:
      noise = jax.random.normal(key, logits_TE.shape)
      logits_TE = clean_TE + noise * noise_scale_TE
    expert_TA, weight_TA = choose(config, logits_TE, balance_bias_E)
    routing = sort_by_expert(expert_TA, weight_TA, config.num_experts)
  importance_E = _importance(routing, config.num_experts)
  losses = balancing_losses(config, logits_TE, routing.group_sizes_E,
                            importance_E)
  if config.router.kind == "noisy_topk" and key is not None:
    losses["cv_load"] = squared_cv(smooth_load(
        clean_TE, logits_TE, noise_scale_TE, config.experts_per_token))
  num_tokens, num_rows = logits_TE.shape[0], routing.token_M.shape[0]
  dropped = jnp.float32(0)
  if routing.row_TA is None:
    taken_T = jnp.zeros(num_tokens, bool).at[routing.token_M].set(True)
    dropped = 1 - jnp.mean(taken_T.astype(jnp.float32))
  load_E = routing.group_sizes_E.astype(jnp.float32) / num_rows
  return routing, RouterOutput(load_E, dropped, losses)


def choose(config: MoEConfig, logits_TE, balance_bias_E=None):
  """Each token's experts [T, A], best first, and their weights [T, A].

  The balance bias shifts scores between 0 and 1, for every kind: so its rate
  means the same everywhere (arXiv 2408.15664, equation 3).
  """
  router, scores_TE = config.router, _scores(config, logits_TE)
  by_score = router.kind in ("softmax_topk", "sigmoid_topk")
  ranked_TE = scores_TE if by_score else logits_TE
  if balance_bias_E is not None:
    ranked_TE = scores_TE + balance_bias_E
  ranked_TE = lax.stop_gradient(ranked_TE)
  if router.num_groups > 1:
    ranked_TE = _in_best_groups(ranked_TE, router)
  _, expert_TA = lax.top_k(ranked_TE, config.experts_per_token)
  if by_score:
    weight_TA = jnp.take_along_axis(scores_TE, expert_TA, -1)
    if router.renormalize:
      # Sigmoids, unlike the best of a softmax, may all be 0.
      weight_TA /= jnp.sum(weight_TA, -1, keepdims=True) + 1e-20
  else:
    # A softmax over the kept logits is KeepTopK's, the rest at -infinity.
    weight_TA = jax.nn.softmax(jnp.take_along_axis(logits_TE, expert_TA, -1))
  return expert_TA, router.weight_scale * weight_TA


def _scores(config: MoEConfig, logits_TE):
  """How well experts and tokens fit, between 0 and 1."""
  if config.router.kind == "sigmoid_topk":
    return jax.nn.sigmoid(logits_TE)
  return jax.nn.softmax(logits_TE)


def _in_best_groups(ranked_TE, router: RouterConfig):
  """The ranks, -infinity outside each token's best groups of experts."""
  ranked_TGE = ranked_TE.reshape(len(ranked_TE), router.num_groups, -1)
  two_TG2, _ = lax.top_k(ranked_TGE, min(2, ranked_TGE.shape[-1]))
  _, group_TC = lax.top_k(jnp.sum(two_TG2, -1), router.groups_per_token)
  chosen_TG = jnp.any(
      group_TC[:, :, None] == jnp.arange(router.num_groups), 1)
  return jnp.where(chosen_TG[..., None], ranked_TGE,
                   -jnp.inf).reshape(ranked_TE.shape)


def sort_by_expert(expert_TA, weight_TA, num_experts: int) -> Routing:
  """Token-choice routing as rows sorted by expert, tokens in order within."""
  num_rows, per_token = expert_TA.size, expert_TA.shape[1]
  expert_M = expert_TA.reshape(-1)
  sort = _sort_few if num_rows <= FEW_ROWS else _sort_many
  order_M, row_M, sizes_E = sort(expert_M, num_experts)
  return Routing(order_M // per_token, weight_TA.reshape(-1)[order_M],
                 sizes_E, row_M.reshape(expert_TA.shape))


def _sort_many(expert_M, num_experts: int):
  """The stable order by expert, its inverse, and the rows of each expert."""
  order_M = jnp.argsort(expert_M, stable=True)
  row_M = jnp.zeros(expert_M.shape, jnp.int32).at[order_M].set(
      jnp.arange(len(expert_M), dtype=jnp.int32), unique_indices=True)
  end_E = jnp.searchsorted(expert_M[order_M], jnp.arange(num_experts),
                           side="right").astype(jnp.int32)
  return order_M, row_M, jnp.diff(end_E, prepend=0)


def _sort_few(expert_M, num_experts: int):
  """The same by comparing all with all: on a GPU three small kernels, where
  sorting and searching are a dozen and a loop that its host steers."""
  m = jnp.arange(len(expert_M), dtype=jnp.int32)
  mine, others = expert_M[:, None], expert_M
  before = (others < mine) | ((others == mine) & (m < m[:, None]))
  row_M = jnp.sum(before, 1, dtype=jnp.int32)
  order_M = jnp.sum(jnp.where(row_M == m[:, None], m, 0), 1, dtype=jnp.int32)
  sizes_E = jnp.sum(expert_M == jnp.arange(num_experts)[:, None], 1,
                    dtype=jnp.int32)
  return order_M, row_M, sizes_E


def _expert_choice(config: MoEConfig, logits_TE) -> Routing:
  """Each expert takes T A / E tokens, by their softmax over experts."""
  num_tokens = logits_TE.shape[0]
  capacity = min(num_tokens, max(1, math.ceil(
      num_tokens * config.experts_per_token / config.num_experts)))
  probs_ET = jax.nn.softmax(logits_TE).T
  weight_EC, token_EC = lax.top_k(probs_ET, capacity)
  sizes_E = jnp.full(config.num_experts, capacity, jnp.int32)
  return Routing(token_EC.reshape(-1), weight_EC.reshape(-1), sizes_E, None)


def _importance(routing: Routing, num_experts: int):
  """The sum of each expert's router weights over the batch."""
  end_E = jnp.cumsum(routing.group_sizes_E)
  row_M = jnp.arange(routing.weight_M.shape[0])
  expert_M = jnp.searchsorted(end_E, row_M, side="right")
  return jax.ops.segment_sum(routing.weight_M, expert_M, num_experts,
                             indices_are_sorted=True)


def squared_cv(x_E):
  """The squared coefficient of variation, variance / mean^2."""
  return jnp.var(x_E) / jnp.square(jnp.mean(x_E))


def balancing_losses(config: MoEConfig, logits_TE, group_sizes_E,
                     importance_E) -> dict[str, jax.Array]:
  """The losses a router may be balanced with, unweighted.

  cv_importance: CV(importance)^2 (Shazeer et al. 2017, section 4).
  switch: E sum_i f_i P_i with f_i the share of the routed rows and P_i the
    mean of the full softmax (Fedus et al. 2021, equation 4), or of sigmoids
    over their sum (arXiv 2412.19437, equation 19); 1 when uniform, whatever
    the number of experts per token.
  router_z: mean of logsumexp(logits)^2 (ST-MoE, equation 5).
  """
  share_E = group_sizes_E / jnp.sum(group_sizes_E)
  probs_TE = _scores(config, logits_TE)
  if config.router.kind == "sigmoid_topk":
    probs_TE /= jnp.sum(probs_TE, -1, keepdims=True) + 1e-20
  mean_prob_E = jnp.mean(probs_TE, 0)
  return {
      "cv_importance": squared_cv(importance_E),
      "switch": config.num_experts * jnp.sum(share_E * mean_prob_E),
      "router_z": jnp.mean(jnp.square(jax.nn.logsumexp(logits_TE, -1))),
  }


def smooth_load(clean_TE, noisy_TE, noise_scale_TE, per_token: int):
  """How many tokens each expert may expect, differentiably.

  Shazeer et al. 2017, appendix A: the probability that an expert stays among
  the top k if its own noise were drawn again and the others' kept.
  """
  num_experts = noisy_TE.shape[-1]
  if per_token == num_experts:
    return jnp.full(num_experts, clean_TE.shape[0], jnp.float32)
  top_TA, _ = lax.top_k(noisy_TE, per_token + 1)
  inside_TE = noisy_TE > top_TA[:, -1:]
  # What an expert must beat: the k-th best of the others.
  bar_TE = jnp.where(inside_TE, top_TA[:, -1:], top_TA[:, -2:-1])
  # With hardly any noise this is a count; a gradient would be 0 / 0.
  scale_TE = jnp.maximum(noise_scale_TE, 1e-6)
  return jnp.sum(jax.scipy.stats.norm.cdf((clean_TE - bar_TE) / scale_TE), 0)


def load_statistics(load_E) -> dict[str, jax.Array]:
  """MaxVio = (max - mean) / mean, and the load's entropy in nats.

  Over the last axis; MaxVio as in arXiv 2408.15664, section 4.1.
  """
  log_load_E = jnp.log(jnp.where(load_E > 0, load_E, 1))
  return {"max_vio": jnp.max(load_E, -1) / jnp.mean(load_E, -1) - 1,
          "entropy": -jnp.sum(load_E * log_load_E, -1)}


BALANCE_RULES = ("sign", "proportional")


def updated_balance_bias(bias_E, load_E, rate: float, rule: str):
  """The loss-free bias after a batch: raised for experts short of load.

  "sign" moves by `rate`, "proportional" by rate times the relative shortage
  (arXiv 2408.15664, algorithm 1 and section 4.3).
  """
  shortage_E = 1 - load_E / jnp.mean(load_E, -1, keepdims=True)
  match rule:
    case "sign":
      return bias_E + rate * jnp.sign(shortage_E)
    case "proportional":
      return bias_E + rate * shortage_E
  raise ValueError(f"rule={rule!r}: use one of {BALANCE_RULES}")
