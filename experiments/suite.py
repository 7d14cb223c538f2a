"""Runs all experiments, or goes on where they were stopped:

  python -m experiments.suite [NAME ...] [--budget laptop] [--workdir runs]
      [--report]

Each is `experiments.main` in a process of its own, in WORKDIR/NAME-BUDGET. What
it measured is kept in experiments/measured/; RESULTS.md and RESULTS.html beside
it are made anew from there after each. With --report nothing is run.

Exit status: 0 done, 1 one of them failed, 2 wrong usage, 130 or 143 stopped.
"""
import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time

from experiments import measured
from experiments import suite_report

# In the order of the report; what is not named comes after.
ORDER = ("width_vs_depth", "few_vs_many_experts", "balancing", "window",
         "sinks_and_biases", "attention_kind", "feedforward",
         "norms_and_positions", "dropout_one_epoch", "gpt2_to_gpt_oss",
         "precision")


def experiments() -> dict[str, pathlib.Path]:
  """Config files by the name of their experiment, in order."""
  found = {path.stem: path for path in sorted(measured.CONFIGS.glob("*.py"))}
  return {name: found[name] for name in (
      *(name for name in ORDER if name in found),
      *(name for name in found if name not in ORDER))}


def main(arguments=None) -> int:
  options = _parser().parse_args(arguments)
  known = experiments()
  if unknown := set(options.names) - set(known):
    print(f"error: {', '.join(sorted(unknown))}: no such experiment; there are "
          f"{', '.join(known)}", file=sys.stderr)
    return 2
  names = [] if options.report else options.names or list(known)
  failed, begun = [], time.monotonic()
  try:
    for number, name in enumerate(names, 1):
      print(f"\n=== {number}/{len(names)} {name}, {options.budget} budget, "
            f"{(time.monotonic() - begun) / 60:.0f} minutes so far",
            flush=True)
      status = _run(known[name], options)
      if status in (130, 143):
        return status
      if status:
        failed.append(name)
    for path in suite_report.write(known):
      print(path)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  if failed:
    print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
  return 1 if failed else 0


def _parser():
  parser = argparse.ArgumentParser(
      prog="python -m experiments.suite",
      description="Runs all experiments, or goes on where they were stopped.")
  parser.add_argument("names", nargs="*", metavar="NAME",
                      help="of experiments; all by default")
  parser.add_argument("--budget", default="laptop",
                      choices=("minute", "laptop", "gpu"))
  parser.add_argument("--workdir", default="runs", type=pathlib.Path,
                      help="each experiment's is NAME-BUDGET in it")
  parser.add_argument("--report", action="store_true", help="make RESULTS.md "
                      "and RESULTS.html from what is kept, and run nothing")
  return parser


def _run(config: pathlib.Path, options) -> int:
  """Runs one to its end, keeps and reports what it measured."""
  workdir = options.workdir / f"{config.stem}-{options.budget}"
  process = subprocess.Popen(
      [sys.executable, "-m", "experiments.main", "--config",
       f"{os.path.relpath(config)}:{options.budget}", "--workdir",
       str(workdir)])
  status = _wait(process)
  if status == 0:
    measured.record(workdir)
    suite_report.write(experiments())
  return status


def _wait(process) -> int:
  """Its exit status. Ctrl-C reaches it too, SIGTERM is passed on; either way
  it saves before it ends."""
  handler = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
  try:
    while True:
      try:
        return process.wait()
      except KeyboardInterrupt:
        continue
  finally:
    signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
  sys.exit(main())
