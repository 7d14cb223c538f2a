"""Runs an ablation; run again, it goes on where it stopped.

  WORKDIR/config.json              what decides the results; never changes
  WORKDIR/tuning/RATE/ARM/seed_N   runs that chose a learning rate, if any
  WORKDIR/compiled                 programs that a restart need not compile

and the files of `experiments.results`. A run leaves checkpoints in its
directory until it has ended.
"""
import dataclasses
import json
import math
import pathlib
import shutil

import rich.console

from experiments import environment
from experiments import measurements
from experiments import plan
from experiments import report
from experiments import results
from experiments import speed
from experiments.design import Design
from experiments.progress import Job, Progress
from jaxlm.data import build_dataset, DataBundle
from jaxlm.train import Diverged, train, TrainResult
from jaxlm.train.step import check_together


def run(name: str, config, design: Design, workdir, *, command: str = "",
        console: rich.console.Console | None = None
        ) -> tuple[pathlib.Path, pathlib.Path]:
  """Finishes the ablation; returns the paths of report.html and report.md.

  Args:
    name: of the experiment. config, design: what its file returned.
    command: how the same ablation is run again, for the report.

  Raises:
    ValueError: the config is impossible, or the workdir another ablation's.
    KeyboardInterrupt: a signal; what was finished is saved.
  """
  plan.check(config)
  runner = _Runner(name, config, design, pathlib.Path(workdir), command,
                   console or rich.console.Console())
  runner.run()
  paths = report.write_report(workdir)
  report.print_table(workdir, runner.console)
  return paths


class _Runner:

  def __init__(self, name, config, design, workdir, command, console):
    self.name, self.config, self.design = name, config, design
    self.workdir, self.command, self.console = workdir, command, console
    self.models = design.models
    self.configs = plan.arm_configs(config, design)
    # Whatever is wrong with the config shows before anything is written.
    measurements.check(design.measurements)
    for arm, model in self.models.items():
      check_together(model, self._train_config(arm, 1.0))
      if config.learning_rate.method == "grid":
        self._train_config(arm, 1.0, config.learning_rate.steps)
    plan.ablation(config, design, name, dict.fromkeys(self.models, 1.0), "", "")

  def _train_config(self, arm, rate, steps=None):
    return plan.train_config(self.configs[arm], self.models[arm], rate, steps)

  def run(self) -> None:
    identity = plan.identity(self.config, self.design)
    refuse_other(self.workdir, identity)
    tuning, runs = self._tuning_jobs(), self._run_jobs()
    with Progress(self.console, [*tuning, *runs]) as progress:
      self.progress = progress
      with progress.stage("reading data"):
        self.data = read_data(self.configs)
      results.write_bytes(self.workdir / "config.json",
                          f"{json.dumps(identity, indent=1)}\n".encode())
      rates = self._learning_rates(tuning)
      self.train_configs = {arm: self._train_config(arm, rates[arm])
                            for arm in self.models}
      self._write_plan(rates)
      for job, (arm, seeds) in runs.items():
        self._finish(job, arm, seeds)
      self._measure_speed()

  def _run_jobs(self) -> dict[Job, tuple[str, tuple[int, ...]]]:
    """In order: all arms of a seed before the next seed.

    So an ablation that is stopped has pairs to compare, and what slows the
    machine down for a while slows all arms.
    """
    config = self.config
    groups = ([tuple(config.seeds)] if config.together
              else [(seed,) for seed in config.seeds])
    jobs = {}
    for seeds in groups:
      for arm, model in self.models.items():
        steps = self.configs[arm].train.steps
        label = f"{arm}  seed{'s' * (len(seeds) > 1)} " + ", ".join(
            map(str, seeds))
        jobs[Job(arm, label, steps, plan.run_flops(
            self.configs[arm], model, steps, len(seeds)))] = arm, seeds
    return jobs

  def _finish(self, job: Job, arm: str, seeds: tuple[int, ...]) -> None:
    directory = results.run_dir(self.workdir, arm, seeds[0]).parent
    if any(results.read_run(self.workdir, arm, seed) is None
           for seed in seeds):
      with self.progress.running(job) as on_step:
        self._train(arm, seeds, directory, on_step)
    else:
      self.progress.skip(job)
    if not self.config.keep_checkpoints:
      _forget_finished(self.workdir, arm, seeds, directory)

  def _train(self, arm, seeds, directory, on_step) -> None:
    """Trains and writes a Run for each seed."""
    try:
      found = train(self.models[arm], self.train_configs[arm],
                    self.data[arm], directory, seeds=seeds, on_step=on_step)
    except Diverged as error:
      if len(seeds) == 1:
        self.progress.print(f"{arm}, seed {seeds[0]} failed: {error}")
        self._write_run(arm, seeds[0], results.Run(failure=str(error)))
        return
      # One seed has ended them all: each for itself, then.
      for seed in seeds:
        if results.read_run(self.workdir, arm, seed) is None:
          self._train(arm, (seed,), directory, on_step)
      return
    for result in found:
      measured = measurements.measure(
          self.design.measurements, self.models[arm], self.train_configs[arm],
          self.data[arm], result)
      self._write_run(arm, result.seed, dataclasses.replace(
          _as_run(result), measured=measured.values, series=measured.series))

  def _write_run(self, arm, seed, run) -> None:
    results.write(results.run_path(self.workdir, arm, seed), run)

  def _tuning_jobs(self) -> dict[Job, tuple[str, float]]:
    config = self.config
    if config.learning_rate.method == "rule":
      return {}
    steps = config.learning_rate.steps
    return {
        Job(arm, f"{arm}  tuning, learning rate {rate:g}", steps,
            plan.run_flops(self.configs[arm], model, steps)): (arm, rate)
        for arm, model in self.models.items()
        for rate in config.learning_rate.grid}

  def _learning_rates(self, jobs) -> dict[str, float]:
    """By rule, or of each arm's runs over the grid the best."""
    if not jobs:
      return plan.rule(self.configs, self.models)
    losses = {arm: {} for arm in self.models}
    for job, (arm, rate) in jobs.items():
      losses[arm][rate] = self._tune(job, arm, rate)
    for arm, found in losses.items():
      if min(found.values()) == math.inf:
        raise ValueError(f"{arm} diverged at every rate of learning_rate.grid="
                         f"{self.config.learning_rate.grid}: add lower ones")
    return {arm: min(found, key=found.get) for arm, found in losses.items()}

  def _tune(self, job, arm, rate) -> float:
    """The held-out loss, infinite for a run that diverged."""
    model, options = self.models[arm], self.config.learning_rate
    workdir = self.workdir / "tuning" / f"{rate:g}"
    found = results.read_run(workdir, arm, options.seed)
    directory = results.run_dir(workdir, arm, options.seed)
    if found:
      self.progress.skip(job)
    else:
      with self.progress.running(job) as on_step:
        try:
          result, = train(
              model, self._train_config(arm, rate, options.steps),
              self.data[arm], directory.parent, seeds=(options.seed,),
              on_step=on_step)
          found = _as_run(result)
        except Diverged as error:
          found = results.Run(failure=str(error))
      results.write(results.run_path(workdir, arm, options.seed), found)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return math.inf if found.failure else found.eval_loss

  def _write_plan(self, rates) -> None:
    path = results.ablation_path(self.workdir)
    now = plan.ablation(self.config, self.design, self.name, rates,
                        plan.describe_data(self.data), self.command)
    if path.is_file():
      now = continued(self.workdir, results.read_ablation(self.workdir), now)
    results.write(path, now)

  def _measure_speed(self) -> None:
    if all(results.read_speed(self.workdir, arm) for arm in self.models):
      return
    with self.progress.stage("measuring speed") as show:
      found = speed.measure(self.models, self.train_configs, on_arm=show,
                            **self.config.speed)
    for arm, measured in found.items():
      results.write(results.speed_path(self.workdir, arm), measured)


def read_data(configs: dict) -> dict[str, DataBundle]:
  """Each arm's text; arms that read the same share it."""
  bundles, found = {}, {}
  for arm, config in configs.items():
    key = json.dumps([config.data.to_dict(), config.train.seq_len])
    if key not in bundles:
      bundles[key] = _read_data(config.data, config.train.seq_len)
    found[arm] = bundles[key]
  return found


def _read_data(options, seq_len: int) -> DataBundle:
  data = build_dataset(
      options.source, options.tokenizer, seq_len,
      heldout_fraction=options.heldout_fraction,
      max_bytes=options.max_bytes or None, first_token=options.first_token)
  if options.train_tokens:
    data = dataclasses.replace(data, train=data.train.first(
        options.train_tokens))
  return data


def refuse_other(workdir: pathlib.Path, identity: dict) -> None:
  """Refuses a workdir that holds another ablation.

  Raises:
    ValueError: naming what differs and the remedy.
  """
  path = workdir / "config.json"
  if not path.is_file():
    if results.ablation_path(workdir).is_file():
      raise ValueError(f"{workdir} holds an ablation without config.json: "
                       "choose another --workdir")
    return
  try:
    before = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}): choose another "
                     "--workdir") from error
  if differ := plan.differences(before, identity):
    raise ValueError(
        f"{workdir} holds an ablation with another config: "
        f"{'; '.join(differ[:6])}{'; ...' if differ[6:] else ''}. Choose "
        "another --workdir, or delete this one to begin anew")


def continued(workdir, before: results.Ablation,
              now: results.Ablation) -> results.Ablation:
  """The plan of an ablation that goes on, perhaps elsewhere."""
  for field in ("data", "arms"):
    if getattr(before, field) != getattr(now, field):
      raise ValueError(
          f"{workdir} was begun with other {field}: {getattr(before, field)}, "
          f"now {getattr(now, field)}. Choose another --workdir, or go back to "
          "the Python and the files it was begun with")
  return dataclasses.replace(
      before, command=now.command,
      versions=environment.merged(before.versions, now.versions),
      hardware=environment.merged(before.hardware, now.hardware))


def _as_run(result: TrainResult) -> results.Run:
  router = result.router and results.Router(
      result.router.load, result.router.max_vio, result.router.entropy,
      result.router.dropped)
  return results.Run(result.eval_loss, result.bits_per_byte,
                     result.tokens_per_second, router)


def _forget_finished(workdir, arm, seeds, directory) -> None:
  """Removes checkpoints, except of runs that failed: those may be looked at."""
  if any(results.read_run(workdir, arm, seed).failure for seed in seeds):
    return
  for seed in seeds:
    shutil.rmtree(directory / f"seed_{seed}" / "checkpoints",
                  ignore_errors=True)
  for path in directory.glob("seeds_*"):
    shutil.rmtree(path, ignore_errors=True)
