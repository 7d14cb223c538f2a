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


def start(program_cache, *arguments) -> subprocess.Popen:
  environment = os.environ | {
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": str(program_cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
      [sys.executable, SCRIPT, *map(str, arguments)], env=environment,
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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


def test_killed_at_any_moment_ends_bit_identical(whole_run, tmp_path,
                                                 program_cache):
  """It saves at every step, so it is nearly always killed while saving."""
  rng = random.Random(0)
  for _ in range(3):
    process = start(program_cache, tmp_path)
    reached = read_steps(process, rng.randint(3, 7))
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  process = start(program_cache, tmp_path)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  first, *_, digest = out.splitlines()
  # A step is reported before it is saved, and while the one before may still
  # be on its way to the disk; what precedes that one is there.
  assert reached - 1 <= int(first)
  assert digest == toy.digest(whole_run.result.params)
  assert losses(tmp_path) == losses(whole_run.workdir)


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
