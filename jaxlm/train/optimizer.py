"""AdamW and Muon, their learning-rate schedules and weight-decay mask."""
import dataclasses

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")

# Which axes of a matrix are contracted with its input, and which are its
# output; axes before them number layers and experts.
MATRICES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj"),
                    ((-3,), (-2, -1))),
    "o_proj": ((-3, -2), (-1,)),
    **dict.fromkeys(("gate_up", "up", "down", "q_a_proj", "kv_a_proj"),
                    ((-2,), (-1,))),
}
# Matrices that Muon leaves to AdamW; both decay them.
OTHER_DECAYED = ("unembedding", "router", "router_noise")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How parameters follow the gradient.

  "muon" orthogonalises the momentum of each matrix of the layers (Jordan
  2024), scaled to AdamW's root mean square (arXiv 2502.16982), so that one
  learning rate serves; what is no such matrix goes by AdamW.

  The schedule warms up linearly; then "cosine" falls over all remaining
  steps, "wsd" stays and falls linearly over the last `decay_fraction` of the
  steps; both end at `final_fraction` of `learning_rate`.

  b1, b2, eps: AdamW's. momentum: Muon's. weight_decay: of matrices alone, not
  of embeddings, positions, norms, biases and sinks; times the learning rate.
  clip_norm: the gradient's global norm at most; 0 does not clip.
  """
  name: str = "adamw"
  learning_rate: float = 1e-3
  schedule: str = "cosine"
  warmup_steps: int = 0
  decay_fraction: float = 0.2
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  momentum: float = 0.95
  weight_decay: float = 0.1
  clip_norm: float = 1.0

  def __post_init__(self):
    for field, choices in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
      value = getattr(self, field)
      if value not in choices:
        raise ValueError(f"optimizer {field}={value!r}: use one of {choices}")
    for field, accepted, remedy in (
        ("learning_rate", self.learning_rate > 0, "must be positive"),
        ("warmup_steps", self.warmup_steps >= 0, "must not be negative"),
        ("decay_fraction", 0 <= self.decay_fraction <= 1, "must be in [0, 1]"),
        ("final_fraction", 0 <= self.final_fraction <= 1, "must be in [0, 1]"),
        ("b1", 0 <= self.b1 < 1, "must be in [0, 1)"),
        ("b2", 0 <= self.b2 < 1, "must be in [0, 1)"),
        ("momentum", 0 <= self.momentum < 1, "must be in [0, 1)"),
        ("eps", self.eps > 0, "must be positive"),
        ("weight_decay", self.weight_decay >= 0, "must not be negative"),
        ("clip_norm", self.clip_norm >= 0, "must not be negative")):
      if not accepted:
        raise ValueError(
            f"optimizer {field}={getattr(self, field)}: {remedy}")


def learning_rate_schedule(config: OptimizerConfig, steps: int):
  """Step (from 0) to learning rate; the peak follows the warmup."""
  peak, warmup = config.learning_rate, config.warmup_steps
  if warmup >= steps:
    raise ValueError(f"optimizer warmup_steps={warmup} leaves none of "
                     f"steps={steps}: warm up for fewer or train for more")
  final = peak * config.final_fraction
  # From peak / (warmup + 1), not from 0: a first step of 0 would be wasted.
  parts = [optax.linear_schedule(peak / (warmup + 1), peak, warmup)]
  starts = [warmup]
  if config.schedule == "cosine":
    parts.append(optax.cosine_decay_schedule(
        peak, steps - warmup, config.final_fraction))
  else:
    decay = min(round(config.decay_fraction * steps), steps - warmup)
    parts.append(optax.constant_schedule(peak))
    if decay:
      parts.append(optax.linear_schedule(peak, final, decay))
      starts.append(steps - decay)
  return optax.join_schedules(parts, starts)


def make_optimizer(config: OptimizerConfig,
                   steps: int) -> optax.GradientTransformation:
  """The transformation of gradients; its state mirrors the parameters."""
  rate = learning_rate_schedule(config, steps)
  optimizer = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps,
                          weight_decay=config.weight_decay, mask=decay_mask)
  if config.name == "muon":
    # optax's own fallback for other leaves has no mask for the decay.
    muon = optax.contrib.muon(
        rate, beta=config.momentum, weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=muon_dimensions, consistent_rms=0.2)
    optimizer = optax.partition({"muon": muon, "adamw": optimizer},
                                muon_labels)
  if config.clip_norm:
    optimizer = optax.chain(clip(config.clip_norm), optimizer)
  return optimizer


def clip(max_norm: float) -> optax.GradientTransformation:
  """Scales gradients down to a global norm of `max_norm`.

  A product with a scalar fuses into what follows; the quotient of optax's
  clip_by_global_norm does not, and on a CPU writes all gradients once more.
  """
  def scale(updates, params):
    del params
    factor = jnp.minimum(1, max_norm / optax.tree.norm(updates))
    return jax.tree.map(lambda g: g * factor, updates)
  return optax.stateless(scale)


def _by_name(function, tree):
  return jax.tree.map_with_path(lambda path, _: function(path[-1].key), tree)


def decay_mask(params):
  return _by_name(lambda name: name in MATRICES or name in OTHER_DECAYED,
                  params)


def muon_labels(params):
  return _by_name(lambda name: "muon" if name in MATRICES else "adamw", params)


def muon_dimensions(params):
  """For each leaf (all of them matrices) the axes of input and output."""
  return _by_name(
      lambda name: optax.contrib.MuonDimensionNumbers(*MATRICES[name]), params)
