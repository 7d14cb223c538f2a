"""Processes that are killed, told to end, or run out of disk."""
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

import toy_training as toy

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "toy_training.py"


def start(program_cache, *arguments, **options) -> subprocess.Popen:
  environment = os.environ | {
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": str(program_cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
      [sys.executable, SCRIPT, *map(str, arguments)], env=environment,
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def read_steps(process, count: int) -> int:
  """Waits for so many steps; the number of the last."""
  for _ in range(count):
    line = process.stdout.readline()
    assert line, process.stderr.read()
  return int(line)


def losses(workdir):
  lines = (workdir / "seed_7" / "metrics.jsonl").read_text().splitlines()
  return [(entry["step"], entry["loss"], entry.get("eval_loss"))
          for entry in map(json.loads, lines)]


class Killer:
  """Runs that are killed after some steps and a random moment more."""

  def __init__(self, program_cache):
    self._forks = start(program_cache, stdin=subprocess.PIPE)

  def run(self, workdir, steps=None, seconds=0.0):
    """What a run printed, and its exit status; `steps` None lets it end."""
    self._forks.stdin.write(f"{workdir}\n")
    self._forks.stdin.flush()
    process, printed = int(self._line()[1]), []
    while steps is None or len(printed) < steps:
      first, *rest = self._line()
      if first == "ended":
        return printed, int(rest[0])
      printed.append(first)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)  # in vain if it has just ended: a zombie
    while (line := self._line())[0] != "ended":
      printed.append(line[0])
    return printed, int(line[1])

  def _line(self) -> list[str]:
    line = self._forks.stdout.readline()
    assert line, self._forks.stderr.read()
    return line.split()

  def close(self):
    self._forks.communicate()


@pytest.fixture
def killer(program_cache):
  killer = Killer(program_cache)
  yield killer
  killer.close()


@pytest.mark.slow
def test_killed_at_any_moment_ends_bit_identical(whole_run, tmp_path, killer):
  """It saves at every step, so it is nearly always killed while saving.

  KILLS in the environment asks for more than 30.
  """
  rng, kills = random.Random(0), int(os.environ.get("KILLS", 30))
  workdir, reached = tmp_path / "0", 0
  while True:
    last = not kills
    # A fifth of them while it starts or restores.
    steps = None if last else rng.choice([0, 1, 2, 3, 4])
    printed, status = killer.run(workdir, steps,
                                 rng.uniform(0, 0.05 if steps else 2.0))
    if status == 0:
      *printed, digest = printed
      assert digest == toy.digest(whole_run.result.params)
      assert losses(workdir) == losses(whole_run.workdir)
      if last:
        return
      workdir, reached = tmp_path / str(int(workdir.name) + 1), 0
      continue
    assert status == -signal.SIGKILL
    kills -= 1
    if printed:
      # A step is reported before it is saved, and while the one before may
      # still be on its way to the disk; what precedes that one is there.
      assert reached - 1 <= int(printed[0])
      reached = int(printed[-1])


@pytest.fixture(scope="module")
def terminated(tmp_path_factory, program_cache):
  """A run that got SIGTERM: its workdir, exit status and last words."""
  workdir = tmp_path_factory.mktemp("terminated")
  process = start(program_cache, workdir)
  read_steps(process, 13)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  return workdir, process.returncode, err


def test_sigterm_saves_and_exits(terminated):
  workdir, status, err = terminated
  assert status == 143
  step = int(re.search("stopped by SIGTERM; saved at step (\\d+)", err)[1])
  assert step >= 13
  assert str(step) in os.listdir(workdir / "seed_7" / "checkpoints")


def test_a_full_disk_ends_the_run_and_harms_nothing(terminated, program_cache):
  workdir, *_ = terminated
  directory = workdir / "seed_7" / "checkpoints"
  before = {path: path.read_bytes() for path in directory.rglob("*")
            if path.is_file()}
  process = start(program_cache, workdir, 6000)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 1, err
  assert f"{directory}: a checkpoint cannot be written" in err
  assert "free space on that disk" in err
  assert before == {path: path.read_bytes() for path in before}
