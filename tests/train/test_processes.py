"""Two real processes with four devices each, as on two hosts."""
import shutil
import signal
import time

import numpy as np
import pytest

from processes import Processes

pytestmark = pytest.mark.slow

MESH = "--mesh=data=4,expert=2"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, program_cache):
  """One process with eight devices."""
  run = Processes(program_cache, tmp_path_factory.mktemp("alone") / "run", MESH)
  assert run.wait() == [0], run.said()
  return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory, program_cache):
  """Two processes of which the second was killed, its other's exit status and
  seconds from then on."""
  run = Processes(program_cache, tmp_path_factory.mktemp("killed") / "run",
                  MESH, count=2)
  run.wait_for("step 5/")
  run.processes[1].send_signal(signal.SIGKILL)
  start = time.monotonic()
  status = run.wait(60)[0]
  return run, status, time.monotonic() - start


def test_a_lost_process_ends_the_other_with_a_word(killed):
  run, status, seconds = killed
  assert status != 0 and seconds < 40
  # What ends it is jax or a failed exchange; the word is there in both cases.
  deadline = time.monotonic() + 5
  while "Start all of them again" not in run.said():
    assert time.monotonic() < deadline, run.said()
    time.sleep(0.1)
  assert "process 0 of 2" in run.said()


def test_the_first_process_alone_speaks(killed):
  run, *_ = killed
  assert "step 1/10" in run.said(0) and "step" not in run.said(1)


def same(losses, wanted):
  """Steps, losses and, where there are any, held-out losses."""
  np.testing.assert_allclose(np.array(losses, float), np.array(wanted, float),
                             rtol=3e-6)


def test_two_processes_have_the_losses_of_one(killed, alone):
  losses = killed[0].losses()
  assert len(losses) >= 4
  same(losses, alone.losses()[:len(losses)])


@pytest.mark.parametrize("count, devices, mesh", [
    (2, 8, "data=2,expert=4"), (1, 4, "data=4")])
def test_the_run_goes_on_with_other_processes_and_another_mesh(
    killed, alone, program_cache, count, devices, mesh):
  before = killed[0].workdir
  workdir = shutil.copytree(before, before.with_name(f"on_{count}"))
  run = Processes(program_cache, workdir, f"--mesh={mesh}", count=count,
                  devices=devices)
  assert run.wait() == [0] * count, run.said()
  first = int(run.said().split("step ")[1].split("/")[0])
  assert first in (3, 5, 7)  # after a checkpoint, not from the beginning
  same(run.losses(), alone.losses())


def test_sigterm_to_one_process_saves_one_step_in_all(program_cache, tmp_path):
  run = Processes(program_cache, tmp_path / "run", MESH, "--steps=1000",
                  "--checkpoint-every=0", "--log-every=1", count=2)
  run.wait_for("step 5/")
  run.processes[1].send_signal(signal.SIGTERM)
  start = time.monotonic()
  assert run.wait(60) == [143, 143], run.said()
  assert time.monotonic() - start < 25
  [saved] = [int(path.name) for path in
             (run.workdir / "seed_0" / "checkpoints").glob("[0-9]*")]
  assert f"saved at step {saved}" in run.said() and saved >= 5
