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
  dropped: share of tokens that no expert took (expert choice), or of routed
    rows without room (the dispatch "capacity"). Nothing else drops.
  losses: the balancing losses, unweighted (see `balancing_losses`).
  """
  load_E: jax.Array
  dropped: jax.Array
  losses: dict[str, jax.Array]


class Sums(typing.NamedTuple):
  """What a report is made of, float32; sums of parts of a batch add up.

  rows_E, importance_E: rows and router weights of each expert.
  probs_E: probabilities, of all experts for each token.
  log_squares: of the logsumexps of logits.
  smooth_load_E: `smooth_load`, where there is noise.
  taken: tokens that were not dropped.
  sequence: probabilities of experts for each token, times their shares of the
    rows of its sequence, where tokens choose.
  """
  rows_E: jax.Array
  importance_E: jax.Array
  probs_E: jax.Array
  log_squares: jax.Array
  smooth_load_E: jax.Array | None
  taken: jax.Array | int
  sequence: jax.Array | None


def router_inputs(config: RouterConfig, router: dict, x_TD) -> dict:
  """Logits in float32, and what else the router's kind needs."""
  x_TD = x_TD.astype(jnp.float32)
  inputs = {"logits_TE": x_TD @ router["router"].astype(jnp.float32)}
  if config.bias:
    inputs["logits_TE"] += router["bias"].astype(jnp.float32)
  if config.balance_bias:
    inputs["balance_bias_E"] = router["balance_bias"]
  if config.kind == "noisy_topk":
    inputs["noise_scale_TE"] = jax.nn.softplus(
        x_TD @ router["noise"].astype(jnp.float32))
  return inputs


def route(config: MoEConfig, logits_TE, *, balance_bias_E=None,
          noise_scale_TE=None, key=None,
          num_sequences: int = 1) -> tuple[Routing, RouterOutput]:
  """Routes tokens by their router logits, as `config.router` says.

  Args:
    logits_TE: of `num_sequences` sequences of one length, one after the other.
    balance_bias_E: added to the scores for the choice alone.
    noise_scale_TE: noisy top-k's softplus(x W_noise).
    key: with it, noisy top-k draws its noise (training); without, it does not.
  """
  clean_TE = logits_TE = logits_TE.astype(jnp.float32)
  noise_TE = draw_noise(config, key, logits_TE.shape)
  num_tokens = taken = len(logits_TE)
  rows_BE = None
  if config.router.kind == "expert_choice":
    routing = expert_choice(config, logits_TE)
    taken_T = jnp.zeros(num_tokens, bool).at[routing.token_M].set(True)
    taken = jnp.sum(taken_T.astype(jnp.float32))
  else:
    if noise_TE is not None:
      logits_TE = clean_TE + noise_TE * noise_scale_TE
    expert_TA, weight_TA = choose(config, logits_TE, balance_bias_E)
    routing = sort_by_expert(expert_TA, weight_TA, config.num_experts)
    rows_BE = count_rows(expert_TA, num_sequences, config.num_experts)
  sums = sum_up(config, logits_TE, routing.group_sizes_E,
                _importance(routing, config.num_experts), taken, rows_BE)
  if noise_TE is not None:
    sums = sums._replace(smooth_load_E=smooth_load(
        clean_TE, logits_TE, noise_scale_TE, config.experts_per_token))
  return routing, report(config, sums, num_tokens)


def draw_noise(config: MoEConfig, key, shape):
  """Noisy top-k's [..., E], while there is a key; None otherwise."""
  if config.router.kind == "noisy_topk" and key is not None:
    return jax.random.normal(key, shape)
  return None


def count_rows(expert_TA, num_sequences: int, num_experts: int):
  """Rows that each expert gets of each sequence, int32 [B, E]."""
  expert_BM = expert_TA.reshape(num_sequences, -1)
  return jnp.sum(expert_BM[..., None] == jnp.arange(num_experts), 1,
                 dtype=jnp.int32)


def sum_up(config: MoEConfig, logits_TE, rows_E, importance_E, taken,
           rows_BE=None) -> Sums:
  """All but the smooth load. `rows_BE`: of the whole of each sequence, though
  the tokens may be a part of it; None where experts choose."""
  probs_TE = _scores(config, logits_TE)
  if config.router.kind == "sigmoid_topk":
    probs_TE /= jnp.sum(probs_TE, -1, keepdims=True) + 1e-20
  sequence = None
  if rows_BE is not None:
    share_BE = rows_BE / jnp.sum(rows_BE, -1, keepdims=True)
    sequence = jnp.sum(share_BE * jnp.sum(
        probs_TE.reshape(len(rows_BE), -1, config.num_experts), 1))
  return Sums(rows_E.astype(jnp.float32), importance_E, jnp.sum(probs_TE, 0),
              jnp.sum(jnp.square(jax.nn.logsumexp(logits_TE, -1))),
              None, taken, sequence)


def report(config: MoEConfig, sums: Sums, num_tokens: int) -> RouterOutput:
  load_E = sums.rows_E / jnp.sum(sums.rows_E)
  dropped = (num_tokens - jnp.asarray(sums.taken, jnp.float32)) / num_tokens
  return RouterOutput(load_E, dropped,
                      balancing_losses(config, sums, num_tokens))


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


def sort_by_expert(expert_TA, weight_TA, num_experts: int,
                   first_choices_first: bool = False) -> Routing:
  """Token-choice routing as rows sorted by expert, tokens in order within, or
  all first choices in front. What chose no expert (`num_experts`) comes last,
  in no group."""
  num_tokens, per_token = expert_TA.shape
  if first_choices_first:
    expert_TA, weight_TA = expert_TA.T, weight_TA.T
  order_M, row_M, sizes_E = sort(expert_TA.reshape(-1), num_experts)
  row_TA = row_M.reshape(expert_TA.shape)
  weight_M = weight_TA.reshape(-1)[order_M]
  if first_choices_first:
    return Routing(order_M % num_tokens, weight_M, sizes_E, row_TA.T)
  return Routing(order_M // per_token, weight_M, sizes_E, row_TA)


def sort(expert_M, num_experts: int):
  """The stable order by expert, its inverse, and the rows of each expert."""
  few = len(expert_M) <= FEW_ROWS
  return (_sort_few if few else _sort_many)(expert_M, num_experts)


def _sort_many(expert_M, num_experts: int):
  order_M = jnp.argsort(expert_M, stable=True)
  row_M = jnp.zeros(expert_M.shape, jnp.int32).at[order_M].set(
      jnp.arange(len(expert_M), dtype=jnp.int32), unique_indices=True)
  end_E = jnp.searchsorted(expert_M[order_M], jnp.arange(num_experts),
                           side="right").astype(jnp.int32)
  return order_M, row_M, jnp.diff(end_E, prepend=0)


def _sort_few(expert_M, num_experts: int):
  """By comparing all with all: on a GPU three small kernels, where sorting
  and searching are a dozen and a loop that its host steers."""
  m = jnp.arange(len(expert_M), dtype=jnp.int32)
  mine, others = expert_M[:, None], expert_M
  before = (others < mine) | ((others == mine) & (m < m[:, None]))
  row_M = jnp.sum(before, 1, dtype=jnp.int32)
  order_M = jnp.sum(jnp.where(row_M == m[:, None], m, 0), 1, dtype=jnp.int32)
  sizes_E = jnp.sum(expert_M == jnp.arange(num_experts)[:, None], 1,
                    dtype=jnp.int32)
  return order_M, row_M, sizes_E


def expert_choice(config: MoEConfig, logits_TE) -> Routing:
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


def balancing_losses(config: MoEConfig, sums: Sums,
                     num_tokens: int) -> dict[str, jax.Array]:
  """The losses a router may be balanced with, unweighted.

  cv_importance: CV(importance)^2 (Shazeer et al. 2017, section 4).
  cv_load: CV(smooth load)^2 (appendix A), where there is noise.
  switch: E sum_i f_i P_i with f_i the share of the routed rows and P_i the
    mean of the full softmax (Fedus et al. 2021, equation 4), or of sigmoids
    over their sum (arXiv 2412.19437, equation 19); 1 when uniform, whatever
    the number of experts per token.
  sequence: the same of each sequence by itself, averaged over them (equations
    17 to 20; f_i counts the rows as they were routed, the balance bias
    included), where tokens choose.
  router_z: mean of logsumexp(logits)^2 (ST-MoE, equation 5).
  """
  share_E = sums.rows_E / jnp.sum(sums.rows_E)
  losses = {
      "cv_importance": squared_cv(sums.importance_E),
      "switch": config.num_experts * jnp.sum(
          share_E * (sums.probs_E / num_tokens)),
      "router_z": sums.log_squares / num_tokens,
  }
  if sums.sequence is not None:
    losses["sequence"] = config.num_experts * sums.sequence / num_tokens
  if sums.smooth_load_E is not None:
    losses["cv_load"] = squared_cv(sums.smooth_load_E)
  return losses


def smooth_load(clean_TE, noisy_TE, noise_scale_TE, per_token: int):
  """How many tokens each expert may expect, differentiably; [T, E] or, of a
  batch that is split, [B, T, E].

  Shazeer et al. 2017, appendix A: the probability that an expert stays among
  the top k if its own noise were drawn again and the others' kept.
  """
  *tokens, num_experts = noisy_TE.shape
  if per_token == num_experts:
    return jnp.full(num_experts, math.prod(tokens), jnp.float32)
  top_TA, _ = lax.top_k(noisy_TE, per_token + 1)
  inside_TE = noisy_TE > top_TA[..., -1:]
  # What an expert must beat: the k-th best of the others.
  bar_TE = jnp.where(inside_TE, top_TA[..., -1:], top_TA[..., -2:-1])
  # With hardly any noise this is a count; a gradient would be 0 / 0.
  scale_TE = jnp.maximum(noise_scale_TE, 1e-6)
  return jnp.sum(jax.scipy.stats.norm.cdf((clean_TE - bar_TE) / scale_TE),
                 tuple(range(len(tokens))))


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
