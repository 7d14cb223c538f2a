"""What the runner costs over the bare loop, and what seeds together bring.

  python -m experiments.benchmarks.runner [--steps 100] [--repeats 3]

The first arm of width_vs_depth's laptop budget is trained by the runner (its
batches, metrics, alarms, checkpoints and progress; without evaluations but the
last) and by a loop that does nothing but call the step on a batch that is
there, in turn. Then all seeds together, under vmap, against one after the
other. Prints one JSON line per figure; medians, with what was compiled
before.
"""
import argparse
import dataclasses
import io
import json
import pathlib
import statistics
import tempfile
import time

import jax
import rich.console

from experiments import plan
from experiments import results
from experiments import runner
from experiments.configs import width_vs_depth
from jaxlm.train.evaluation import Heldout
from jaxlm.train.memory import keep_freed_memory
from jaxlm.train.programs import Programs, SeedBatches


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=100)
  parser.add_argument("--repeats", type=int, default=3)
  options = parser.parse_args()
  keep_freed_memory()
  config = width_vs_depth.get_config("laptop")
  config.train.steps, config.train.eval_every = options.steps, 0
  config.data.max_bytes = 4_000_000
  design = width_vs_depth.get_design(config)
  arm = design.baseline
  design = dataclasses.replace(
      design, solutions={arm: design.solutions[arm]}, claims=(),
      descriptions={arm: design.descriptions[arm]})
  figures = _runner_over_bare(config, design, arm, options.repeats)
  figures |= _together_over_single(config, design, arm, options)
  print(json.dumps({"platform": jax.default_backend(), "arm": arm,
                    "steps": options.steps, **figures}))


def _runner_over_bare(config, design, arm, repeats) -> dict[str, float]:
  config.seeds = config.seeds[:1]
  taken = {"runner": [], "bare": []}
  for repeat in range(repeats + 1):  # the first compiles
    with tempfile.TemporaryDirectory() as directory:
      seconds = _by_the_runner(config, design, arm, pathlib.Path(directory))
    bare = _bare(config, design, arm, config.seeds)
    if repeat:
      taken["runner"].append(seconds)
      taken["bare"].append(bare)
  runner_seconds, bare = (statistics.median(taken[name]) for name in taken)
  return {"runner_seconds": runner_seconds, "bare_seconds": bare,
          "runner_over_bare": runner_seconds / bare}


def _by_the_runner(config, design, arm, workdir) -> float:
  """Seconds from the first step to the last, which ends with an evaluation."""
  for name in design.models:  # speed is not what is measured here
    results.write(results.speed_path(workdir, name), results.Speed())
  runner.run("benchmark", config, design, workdir,
             console=rich.console.Console(file=io.StringIO()))
  lines = results.read_metrics(results.metrics_path(
      workdir, arm, config.seeds[0]))
  return lines[-1]["seconds"]


def _bare(config, design, arm, seeds) -> float:
  """Seconds of the steps alone, and of the runner's one evaluation."""
  model = design.models[arm]
  train_config = plan.train_config(
      config, model, plan.rule({arm: config}, {arm: model})[arm])
  data = runner.read_data({arm: config})[arm]
  programs = Programs(model, train_config, seeds)
  programs.compile()
  state = programs.init()
  batch = next(SeedBatches(data.train, train_config.batch_size, seeds))
  heldout = Heldout(programs, train_config, data)
  jax.block_until_ready(state)
  begun = time.perf_counter()
  for _ in range(train_config.steps):
    state, metrics = programs.step(state, batch)
  jax.device_get((metrics, heldout.begin(state.params)))
  return time.perf_counter() - begun


def _together_over_single(config, design, arm, options) -> dict[str, float]:
  """Tokens a second of five seeds under vmap over those of one."""
  rates = {}
  for count in (1, 5):
    seeds = tuple(range(count))
    _bare(config, design, arm, seeds)  # compiles
    rates[count] = statistics.median(
        count / _bare(config, design, arm, seeds)
        for _ in range(options.repeats))
  return {"together_over_single": rates[5] / rates[1]}


if __name__ == "__main__":
  main()
