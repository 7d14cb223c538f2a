"""A run of training, from the first step or from where it stopped."""
import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import math
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxlm.config import ModelConfig
from jaxlm.config_dict import to_dict
from jaxlm.data.bundle import DataBundle
from jaxlm.data.pipeline import prefetch
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.multihost import is_main
from jaxlm.train.checkpoint import CheckpointError, Checkpoints
from jaxlm.train.evaluation import Heldout, RouterLoad
from jaxlm.train.metrics import LossWatch, MetricsWriter
from jaxlm.train.programs import Programs, SeedBatches
from jaxlm.train.signals import Interrupted, Signals
from jaxlm.train.step import TrainConfig, check_together

# Of TrainConfig, what a run that continues may have otherwise.
MAY_CHANGE = ("log_every", "checkpoint_every", "keep", "keep_best",
              "spike_factor")


class Diverged(ArithmeticError):
  """A run whose loss is not finite or leapt up; its last checkpoint stands."""

  def __init__(self, step: int, loss: float, reason: str):
    super().__init__(step, loss, reason)
    self.step, self.loss, self.reason = step, loss, reason

  def __str__(self):
    return f"step {self.step}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """How a run ended.

  eval_loss: nats a token on the held-out batches. position_loss: the same of
  the targets at each place of a row, [seq_len]; None where no row has one.
  tokens_per_second: median over the steps, without compilation, evaluations
  and checkpoints; of all seeds together where they train together. seconds:
  from the first step on.
  router: None without expert layers. params: the final parameters.
  """
  seed: int
  steps: int
  eval_loss: float
  bits_per_byte: float
  position_loss: list[float | None]
  tokens_per_second: float
  seconds: float
  router: RouterLoad | None
  params: Any


def train(model_config: ModelConfig, train_config: TrainConfig,
          data: DataBundle, workdir, *, seeds: Sequence[int] = (0,),
          on_step: Callable[[int, dict[str, float]], None] | None = None,
          mesh: Mapping[str, int] | Mesh | None = None) -> list[TrainResult]:
  """Trains to the last step, one result for each seed.

  Several seeds train together under vmap, each with its own initial
  parameters, order of the data and noise. The same call continues a run that
  was stopped, from its newest good checkpoint; a finished run trains no more.

  WORKDIR/seed_N/ gets metrics.jsonl and TensorBoard files; a line of an
  evaluation has the experts' `load` [L][E] on the held-out batches.
  WORKDIR/seed_N/checkpoints (or seeds_N_M.../checkpoints) the checkpoints.

  With several processes (`jaxlm.parallel.multihost`) each makes this call and
  each sees WORKDIR; the first writes the metrics, all the checkpoints.

  Args:
    on_step: called with each step's number and metrics, means over the seeds:
      loss, grad_norm, learning_rate, tokens, seconds, tokens_per_second, and
      on evaluations eval_loss and eval_bits_per_byte; a step behind.
    mesh: splits one seed's state and batches over devices: a mesh of
      `jaxlm.parallel.mesh`, or the sizes of its axes. Another mesh may go on
      with the same run.

  Raises:
    ValueError: configs, data or a checkpoint that do not belong together.
    CheckpointError: a checkpoint cannot be written, or none can be read.
    Diverged: the loss is not finite or leapt up.
    Interrupted: SIGTERM or Ctrl-C, once the state is saved.
  """
  check_together(model_config, train_config)
  check_data(model_config, train_config, data)
  seeds = tuple(seeds)
  if len(set(seeds)) != len(seeds) or not seeds or min(seeds) < 0:
    raise ValueError(f"seeds={list(seeds)}: name at least one, none twice and "
                     "none below 0")
  mesh = _checked_mesh(mesh, seeds)
  with Signals() as signals:
    with contextlib.ExitStack() as stack:
      run = _Run(model_config, train_config, data, pathlib.Path(workdir),
                 seeds, on_step, mesh, stack)
      while run.step < train_config.steps and not signals.stop(run.step):
        run.advance()
      run.save()
      results = [] if signals.received else run.results()
    if signals.received:  # by now all is on disk
      raise Interrupted(signals.received, run.step)
  return results


def _checked_mesh(mesh, seeds) -> Mesh | None:
  if mesh is None:
    if jax.process_count() > 1:
      raise ValueError(f"mesh=None uses one device of {jax.device_count()} on "
                       f"{jax.process_count()} processes: name a mesh, such as "
                       f"{{'data': {jax.device_count()}}}")
    return None
  if len(seeds) > 1:
    raise ValueError(f"seeds={list(seeds)} with a mesh: seeds that train "
                     "together stay on one device; give one seed a call, or "
                     "leave out the mesh")
  return mesh if isinstance(mesh, Mesh) else make_mesh(mesh)


def check_data(model_config: ModelConfig, train_config: TrainConfig,
               data: DataBundle) -> None:
  if data.train.seq_len != train_config.seq_len:
    raise ValueError(f"train seq_len={train_config.seq_len}, but the data is "
                     f"packed in rows of {data.train.seq_len}: build it with "
                     "the same seq_len")
  if data.tokenizer.vocab_size > model_config.vocab_size:
    raise ValueError(f"model vocab_size={model_config.vocab_size} is less than "
                     f"the tokenizer's {data.tokenizer.vocab_size}")


class _Pending(NamedTuple):
  """A step under way: its results are fetched a step later."""
  step: int
  metrics: dict[str, jax.Array]
  evaluation: dict[str, jax.Array] | None


class _Run:
  """A run under way. Nothing in it waits for the step just begun."""

  def __init__(self, model_config, train_config, data, workdir, seeds, on_step,
               mesh, stack):
    self.config, self.seeds, self.on_step = train_config, seeds, on_step
    self.programs = Programs(model_config, train_config, seeds, mesh)
    self.heldout = Heldout(self.programs, train_config, data)
    names = [f"seed_{seed}" for seed in seeds]
    directory = workdir / (names[0] if len(seeds) == 1 else "seeds_" + "_".join(
        map(str, seeds))) / "checkpoints"
    self.checkpoints = Checkpoints(directory, train_config.keep,
                                   train_config.keep_best)
    stack.push(self._leave)
    self.identity = {"seeds": list(seeds), "model": to_dict(model_config),
                     "train": {name: value for name, value
                               in to_dict(train_config).items()
                               if name not in MAY_CHANGE}}
    self.batches = prefetch(SeedBatches(
        data.train, train_config.batch_size, seeds, self.programs.local_rows))
    stack.callback(self.batches.close)
    recent = self._restore()
    text = data.tokenizer.to_json()
    if text and is_main():  # for who loads the model; of this run, by now
      (directory / "tokenizer.json").write_text(text, "utf-8")
    self.watches = [LossWatch(train_config.spike_factor, r) for r in recent]
    self.writers = []
    for name in names:
      self.writers.append(MetricsWriter(workdir / name, self.step))
      stack.callback(self.writers[-1].close)
    kept = self.writers[0].kept
    self.seconds_before = kept[-1]["seconds"] if kept else 0.0
    self.pending = collections.deque()
    self.evaluation, self.evaluated = None, None
    self.rates, self.start = [], None

  def _restore(self):
    """Sets state, step and position of the data; returns recent losses."""
    restored = self.checkpoints.restore(self.programs.abstract_state,
                                        self.identity)
    if restored is None:
      self.state, self.step, self.saved = self.programs.init(), 0, None
      return [[] for _ in self.seeds]
    self.state, about = restored
    self.step = self.saved = about["step"]
    self.batches.set_state(about["data"])
    return about["recent_losses"]

  def _leave(self, error_type, error, traceback):
    # What is being saved is whole before the process may end; after a failed
    # save there is nothing to wait for, and orbax may never return.
    if not isinstance(error, CheckpointError):
      self.checkpoints.close()

  def advance(self) -> None:
    """One step; then what is due."""
    config = self.config
    if self.start is None:
      self.programs.compile()
      self.start = self.clock = time.perf_counter()
    self.state, metrics = self.programs.step(self.state, next(self.batches))
    self.step += 1
    last = self.step == config.steps
    evaluation = None
    if last or config.eval_every and self.step % config.eval_every == 0:
      evaluation = self.heldout.begin(self.state.params)
    self.pending.append(_Pending(self.step, metrics, evaluation))
    self._settle(keep=1)
    self.checkpoints.check()
    if config.checkpoint_every and self.step % config.checkpoint_every == 0:
      self.save()

  def save(self) -> None:
    """Begins to save this step, unless it is saved already."""
    self._settle(keep=0)
    if self.saved == self.step:
      return
    for writer in self.writers:
      writer.flush()
    about = {**self.identity, "data": self.batches.get_state(),
             "recent_losses": [watch.recent for watch in self.watches]}
    eval_loss = (statistics.fmean(result.loss for result in self.evaluation)
                 if self.evaluated == self.step else None)
    try:
      self.checkpoints.save(self.step, self.state, about, eval_loss)
    except FloatingPointError as error:
      raise Diverged(self.step, math.nan, str(error)) from error
    self.saved, self.clock = self.step, None

  def _settle(self, keep: int) -> None:
    """Waits for all steps but the `keep` newest, and reports them."""
    while len(self.pending) > keep:
      step, metrics, evaluation = self.pending.popleft()
      metrics = jax.device_get(metrics)
      now = time.perf_counter()
      # The clock stands still where something else ran in between.
      if self.clock is not None:
        self.rates.append(self.programs.tokens_per_step / (now - self.clock))
      self.clock = now
      entries = [self._entry(step, i, metrics) for i in range(len(self.seeds))]
      if evaluation is not None:
        self.evaluation = self.heldout.finish(evaluation, len(self.seeds))
        self.evaluated = step
        for entry, result in zip(entries, self.evaluation):
          entry["eval_loss"] = result.loss
          entry["eval_bits_per_byte"] = result.bits_per_byte
          if result.router is not None:
            entry["load"] = result.router.load
        self.clock = None
      self._report(step, entries, evaluation is not None)

  def _entry(self, step: int, i: int, metrics) -> dict[str, Any]:
    """What is told of a step and the i-th seed; raises Diverged."""
    if len(self.seeds) > 1:
      metrics = {name: value[i] for name, value in metrics.items()}
    means = {name: float(value.mean()) for name, value in metrics.items()
             if name != "load"}
    reason = self.watches[i].alarm(means["loss"], means["grad_norm"])
    if reason:
      raise Diverged(step, means["loss"], f"{reason} (seed {self.seeds[i]})")
    config = self.config
    return {"step": step, "loss": means.pop("loss"),
            "tokens": step * config.batch_size * config.seq_len,
            "seconds": (self.seconds_before + time.perf_counter()
                        - self.start), **means}

  def _report(self, step: int, entries, evaluated: bool) -> None:
    config = self.config
    rate = statistics.median(self.rates) if self.rates else None
    if evaluated or step % config.log_every == 0 or step == config.steps:
      for writer, entry in zip(self.writers, entries):
        if rate is not None:
          entry["tokens_per_second"] = rate
        writer.write(entry)
      self.rates = []
    if self.on_step is not None:
      shown = {name: statistics.fmean(entry[name] for entry in entries)
               for name in entries[0] if name not in ("step", "load")}
      if rate is not None:
        shown["tokens_per_second"] = rate
      self.on_step(step, shown)

  def results(self) -> list[TrainResult]:
    if self.evaluation is None:  # the run had ended before
      self.evaluation = self.heldout.finish(
          self.heldout.begin(self.state.params), len(self.seeds))
    return [self._result(i) for i in range(len(self.seeds))]

  def _result(self, i: int) -> TrainResult:
    lines, heldout = self.writers[i].kept, self.evaluation[i]
    rates = [line["tokens_per_second"] for line in lines
             if "tokens_per_second" in line]
    seconds = lines[-1]["seconds"]
    params = self.state.params
    if len(self.seeds) > 1:
      params = jax.tree.map(lambda x: x[i], params)
    return TrainResult(
        self.seeds[i], self.step, heldout.loss, heldout.bits_per_byte,
        heldout.position_loss,
        statistics.median(rates) if rates
        else self.programs.tokens_per_step * self.step / seconds,
        seconds, heldout.router, params)
