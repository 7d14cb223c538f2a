"""A run of training, from the first step or from where it stopped."""
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.bundle import DataBundle
from jaxlm.train.step import TrainConfig


class Diverged(ArithmeticError):
  """The loss is not finite or leapt up; the last good checkpoint stands."""

  def __init__(self, step: int, loss: float, seed: int, reason: str):
    super().__init__(step, loss, seed, reason)
    self.step, self.loss, self.seed, self.reason = step, loss, seed, reason

  def __str__(self):
    return f"{self.reason} at step {self.step} (seed {self.seed})"


class Interrupted(KeyboardInterrupt):
  """A signal ended the run after its state was saved."""

  def __init__(self, signal_number: int, step: int):
    super().__init__(f"stopped by signal {signal_number}; saved at step {step}")
    self.signal_number, self.step = signal_number, step

  @property
  def exit_status(self) -> int:
    """What a shell expects: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + self.signal_number


@dataclasses.dataclass(frozen=True)
class RouterLoad:
  """Over the held-out batches: load [L][E], max_vio [L], entropy [L]."""
  load: list[list[float]]
  max_vio: list[float]
  entropy: list[float]
  dropped: float


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """How a run ended.

  eval_loss: nats a token on the held-out batches. tokens_per_second: median
  over the steps, without compilation, evaluations and checkpoints; of all
  seeds together where they train together. seconds: from the first step on.
  router: None without expert layers. params: the final parameters.
  """
  seed: int
  steps: int
  eval_loss: float
  bits_per_byte: float
  tokens_per_second: float
  seconds: float
  router: RouterLoad | None
  params: Any


def train(model_config: ModelConfig, train_config: TrainConfig,
          data: DataBundle, workdir, *, seeds: Sequence[int] = (0,),
          on_step: Callable[[int, dict[str, float]], None] | None = None,
          ) -> list[TrainResult]:
  """Trains to the last step, one result for each seed.

  Several seeds train together under vmap, each with its own initial
  parameters, order of the data and noise. The same call continues a run that
  was stopped, from its newest good checkpoint; a finished run trains no more.

  WORKDIR/seed_N/ gets metrics.jsonl and TensorBoard files;
  WORKDIR/seed_N/checkpoints (or seeds_N_M.../checkpoints) the checkpoints.

  Args:
    on_step: called with each step's number and metrics, means over the seeds:
      loss, grad_norm, learning_rate, tokens, seconds, tokens_per_second, and
      on evaluations eval_loss and eval_bits_per_byte; a step behind.

  Raises:
    ValueError: configs, data or a checkpoint that do not belong together.
    CheckpointError: a checkpoint cannot be written, or none can be read.
    Diverged: the loss is not finite or leapt up.
    Interrupted: SIGTERM or Ctrl-C, once the state is saved.
  """
  raise NotImplementedError
