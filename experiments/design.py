"""What a config file of an experiment is made from.

A config file has two functions. `get_config(budget)` returns plain values,
which flags may override; `get_design(config)` makes the arms and the claims
of them, so that overrides take effect:

  def get_config(budget="laptop"):
    return design.make_config(MODEL, BUDGETS, budget)

  def get_design(config) -> Design:
    ...
"""
import dataclasses

import ml_collections

from experiments.budget import apart, Solution
from experiments.claims import Claim
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          NormConfig, RopeConfig, RouterConfig)

COMMON = {
    "seeds": (0, 1, 2, 3, 4),
    # The seeds of an arm train together, under vmap: for accelerators.
    "together": False,
    # Checkpoints of finished runs, the final parameters among them.
    "keep_checkpoints": False,
    # max_bytes 0 takes all of the source.
    "data": {"source": "python-stdlib", "tokenizer": "bytes",
             "heldout_fraction": 0.05, "max_bytes": 0},
    "train": {"steps": 1, "batch_size": 8, "seq_len": 256, "accumulate": 1,
              "dtype": "float32", "remat": "none", "scan_layers": True,
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
    "balancing": {"switch": 0.01, "router_z": 0.0},
    # Each of `repeats` timings lasts `seconds` or longer.
    "speed": {"prompt_tokens": 256, "new_tokens": 64, "repeats": 7,
              "seconds": 0.2},
}


@dataclasses.dataclass(frozen=True)
class Design:
  """An experiment with its arms solved.

  question: one sentence. baseline: the arm that others are compared with.
  solutions, descriptions: by arm. notes: why a quantity is not held equal.
  """
  question: str
  baseline: str
  solutions: dict[str, Solution]
  descriptions: dict[str, str]
  claims: tuple[Claim, ...]
  notes: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def models(self) -> dict[str, ModelConfig]:
    return {arm: found.config for arm, found in self.solutions.items()}


def make_config(model: dict, budgets: dict[str, dict],
                budget: str) -> ml_collections.ConfigDict:
  """COMMON with a `model` section and what the budget says otherwise.

  Args:
    model: every key that a budget or a flag may set.
    budgets: by name, nested like the config.
  """
  if budget not in budgets:
    raise ValueError(f"budget {budget!r}: use one of {', '.join(budgets)}")
  config = ml_collections.ConfigDict(
      {"budget": budget, **COMMON, "model": model})
  config.lock()
  config.update(budgets[budget])
  return config


def decoder(config, num_layers: int, d_model: int, num_heads: int, *,
            mlp: MLPConfig | None = None,
            moe: MoEConfig | None = None) -> ModelConfig:
  """gpt-oss in small: biases, sinks, and a window on every other layer.

  `config.model` has vocab_size, head_dim, num_kv_heads and sliding_window.
  """
  model = config.model
  attention = AttentionConfig(
      num_heads, model.num_kv_heads, model.head_dim, RopeConfig(),
      RopeConfig(), sliding_window=model.sliding_window, sinks=True,
      biases=("q", "k", "v", "o"))
  return ModelConfig(
      model.vocab_size, d_model, num_layers, attention, mlp, moe,
      layer_pattern=("sliding", "full"), norm=NormConfig(eps=1e-5),
      tie_embeddings=True)


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
