"""What a config file of an experiment is made from.

A config file has two functions. `get_config(budget)` returns plain values,
which flags may override; `get_design(config)` makes the arms and the claims
of them, so that overrides take effect:

  def get_config(budget="laptop"):
    return design.make_config(MODEL, BUDGETS, budget)

  def get_design(config) -> Design:
    ...

BUDGETS says for each of "minute", "laptop" and "gpu" what differs from this
file's own BUDGETS.
"""
import dataclasses

import ml_collections
from ml_collections.config_dict import placeholder

from experiments import budget as solver
from experiments.budget import apart, Solution
from experiments.claims import Claim
from experiments.scaling import Trend
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          NormConfig, PROJECTIONS, RopeConfig, RouterConfig)

COMMON = {
    "seeds": (0, 1, 2, 3, 4),
    # The seeds of an arm train together, under vmap: for accelerators.
    "together": False,
    # Checkpoints of finished runs, the final parameters among them.
    "keep_checkpoints": False,
    # max_bytes 0 takes all of the source, train_tokens 0 all of what is not
    # held out. With first_token every row begins with an end-of-document.
    "data": {"source": "python-stdlib", "tokenizer": "bytes",
             "heldout_fraction": 0.05, "max_bytes": 0, "train_tokens": 0,
             "first_token": False},
    "train": {"steps": 1, "batch_size": 8, "seq_len": 256, "accumulate": 1,
              "dtype": "float32", "remat": "none", "scan_layers": True,
              "simulate": "none", "eval_simulate": placeholder(str),
              "eval_every": 0, "eval_batches": 16, "log_every": 10,
              "checkpoint_every": 0, "spike_factor": 2.0},
    "optimizer": {"name": "adamw", "schedule": "cosine", "warmup_steps": 20,
                  "final_fraction": 0.1, "b2": 0.95, "weight_decay": 0.1,
                  "clip_norm": 1.0},
    # method "rule": base * (reference_d_model / d_model) ** exponent.
    # method "grid": the best of `grid` after `steps` with `seed`, for each arm.
    "learning_rate": {"method": "rule", "base": 1e-3, "exponent": 0.5,
                      "reference_d_model": 64, "grid": (5e-4, 1e-3, 2e-3),
                      "steps": 1, "seed": 1000},
    # Weights of the router's losses, in arms that have a router.
    "balancing": {"switch": 0.01, "sequence": 0.0, "cv_importance": 0.0,
                  "cv_load": 0.0, "router_z": 0.0,
                  "bias_rule": placeholder(str), "bias_rate": 1e-3},
    # Each of `repeats` timings lasts `seconds` or longer.
    "speed": {"prompt_tokens": 256, "new_tokens": 64, "repeats": 7,
              "seconds": 0.2},
}


# What every experiment has in a budget, unless its own file says otherwise.
BUDGETS = {
    # About a minute on 2 cores, most of it compilation.
    "minute": {
        "seeds": (0, 1), "data": {"max_bytes": 2_000_000},
        "train": {"steps": 30, "batch_size": 4, "eval_batches": 4,
                  "log_every": 5, "eval_every": 15},
        "optimizer": {"warmup_steps": 5},
        "learning_rate": {"base": 6e-3, "reference_d_model": 48},
        "speed": {"repeats": 3, "seconds": 0.05, "new_tokens": 32}},
    # 10 to 25 minutes on 2 cores. Batches are small: at equal text, more steps
    # bring the loss further down.
    "laptop": {
        "train": {"steps": 400, "batch_size": 2, "eval_every": 100,
                  "eval_batches": 48, "checkpoint_every": 200},
        # Between 3e-3 and 6e-3, at which two seeds of one layer differed more;
        # that was before embeddings were scaled.
        "learning_rate": {"base": 4e-3, "reference_d_model": 48}},
    # 25 minutes on one large GPU, by arithmetic and not yet by measurement: an
    # experiment of 35 runs of 16 M tokens at 25 MFLOP a token is 1.4e16 FLOP,
    # 20 minutes at 12 TFLOP/s, about 1 % of what such a GPU can do in bfloat16;
    # five minutes remain for compiling.
    "gpu": {
        "together": True,
        "train": {"steps": 1000, "batch_size": 32, "seq_len": 512,
                  "dtype": "bfloat16", "eval_every": 200, "eval_batches": 32,
                  "checkpoint_every": 250},
        "optimizer": {"warmup_steps": 100},
        "learning_rate": {"base": 3e-3, "reference_d_model": 224},
        "speed": {"prompt_tokens": 512}},
}


@dataclasses.dataclass(frozen=True)
class Design:
  """An experiment with its arms solved.

  question: one sentence. baseline: the arm that others are compared with.
  solutions, descriptions: by arm. notes: why a quantity is not held equal.
  overrides: by arm, how it is trained otherwise than the config says, nested
    like it: {"none": {"balancing": {"switch": 0.0}}}.
  measurements: of `experiments.measurements`, taken of every run's end.
  trend: a law over some of the arms, to be fitted.
  """
  question: str
  baseline: str
  solutions: dict[str, Solution]
  descriptions: dict[str, str]
  claims: tuple[Claim, ...]
  notes: dict[str, str] = dataclasses.field(default_factory=dict)
  overrides: dict[str, dict] = dataclasses.field(default_factory=dict)
  measurements: tuple[str, ...] = ()
  trend: Trend | None = None

  def __post_init__(self):
    for name in ("descriptions", "overrides"):
      if unknown := set(getattr(self, name)) - set(self.solutions):
        raise ValueError(f"{name} of {sorted(unknown)}, which are no arms: "
                         f"there are {list(self.solutions)}")

  @property
  def models(self) -> dict[str, ModelConfig]:
    return {arm: found.config for arm, found in self.solutions.items()}


def make_config(model: dict, budgets: dict[str, dict],
                budget: str) -> ml_collections.ConfigDict:
  """COMMON with a `model` section and what the budget says otherwise.

  Args:
    model: every key that a budget or a flag may set.
    budgets: by name, nested like the config; what is not in this file's
      BUDGETS, or is otherwise.
  """
  if budget not in budgets:
    raise ValueError(f"budget {budget!r}: use one of {', '.join(budgets)}")
  config = ml_collections.ConfigDict(
      {"budget": budget, **COMMON, "model": model})
  config.lock()
  config.update(BUDGETS.get(budget, {}))
  config.update(budgets[budget])
  return config


def solve(config, arms: dict[str, dict], **targets: float
          ) -> dict[str, Solution]:
  """Arms of equal size, near the targets; `config.model.slack` says how near.

  Args:
    arms: by name, the arguments of `budget.solve` that are its own.
    targets: of budget.QUANTITIES.
  """
  seq_len = config.train.seq_len
  common = solver.common_targets(arms, targets, config.model.slack,
                                 seq_len=seq_len)
  return solver.solve_arms(arms, targets=common, seq_len=seq_len)


def decoder(config, num_layers: int, d_model: int, num_heads: int, *,
            attention: dict | None = None, **changes) -> ModelConfig:
  """gpt-oss in small: biases, sinks, and a window on every other layer.

  Embeddings are scaled, where gpt-oss's are not: they are tied to the logits,
  begin at 0.02, and what layers add drowned them. Four layers lost 0.36
  nats/token by it, so that depth seemed to hurt and norms after the sum to help.

  `config.model` has vocab_size, head_dim, num_kv_heads and sliding_window.

  Args:
    attention, changes: fields of AttentionConfig and ModelConfig that differ;
      `mlp` or `moe` has to be among them.
  """
  model = config.model
  heads = AttentionConfig(**{
      "num_heads": num_heads, "num_kv_heads": model.num_kv_heads,
      "head_dim": model.head_dim, "rope_full": RopeConfig(),
      "rope_sliding": RopeConfig(), "sliding_window": model.sliding_window,
      "sinks": True, "biases": PROJECTIONS, **(attention or {})})
  return ModelConfig(**{
      "vocab_size": model.vocab_size, "d_model": d_model,
      "num_layers": num_layers, "attention": heads,
      "layer_pattern": ("sliding", "full"), "norm": NormConfig(eps=1e-5),
      "tie_embeddings": True, "scale_embeddings": True, **changes})


def feed_forward(d_ff: int) -> MLPConfig:
  """gpt-oss's: clamped SwiGLU with biases, gate and up interleaved."""
  return MLPConfig(d_ff, "clamped_swiglu", bias=True, interleaved=True)


def experts(num_experts: int, experts_per_token: int, d_expert: int,
            shared: bool = False) -> MoEConfig:
  """gpt-oss's router and experts.

  With `shared`, one of the experts counted is taken by every token and the
  router chooses among the others.
  """
  expert = feed_forward(d_expert)
  return MoEConfig(
      num_experts - shared, experts_per_token - shared, expert,
      RouterConfig("topk_softmax", bias=True), expert if shared else None)


def attention_width_apart(config: ModelConfig) -> float:
  """How far the heads together are from d_model wide; for `prefer`."""
  attention = config.attention
  return apart(attention.num_heads * attention.head_dim, config.d_model)


def around(center: float, step: int = 1, low: float = 0.6,
           high: float = 1.6) -> range:
  """Multiples of `step` from low to high times the centre, to search."""
  first = max(step, int(low * center) // step * step)
  return range(first, int(high * center) + step, step)


def heads_up_to(config, most: float) -> range:
  """Numbers of query heads that the key/value heads divide."""
  kv_heads = config.model.num_kv_heads
  return range(kv_heads, int(most) + kv_heads + 1, kv_heads)
