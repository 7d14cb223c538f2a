import io

import pytest
import rich.console

from experiments import progress as progress_lib
from experiments.progress import Estimate, Job, Progress


def job(arm, seed=0, steps=10, flops=100.0):
  return Job(arm, f"{arm}  seed {seed}", steps, flops)


def test_nothing_is_known_before_the_first_step():
  assert Estimate([job("a")]).seconds_left() is None


def test_an_arm_goes_on_at_its_own_speed_and_others_at_the_mean():
  a0, a1, b0, b1, c0 = (job("a"), job("a", 1), job("b"), job("b", 1),
                        job("c", flops=50.0))
  estimate = Estimate([a0, b0, c0, a1, b1])
  estimate.started(a0, 4.0)
  estimate.worked(a0, 0, 10.0)
  # The rest at a's speed, 0.1 seconds a FLOP, and two more to compile.
  assert estimate.seconds_left() == pytest.approx(2 * 4 + 0.1 * 350)
  estimate.started(b0, 8.0)
  estimate.worked(b0, 5, 15.0)
  # b needs 0.3 seconds a FLOP; c is unknown: 25 seconds for 150 FLOP.
  left = 0.3 * 50 + 0.1 * 100 + 0.3 * 100 + (6 + 50 * 25 / 150)
  assert estimate.seconds_left() == pytest.approx(left)
  assert estimate.fraction == pytest.approx(150 / 450)


def test_a_run_that_goes_on_counts_only_what_it_does():
  one, two = job("a"), job("a", 1)
  estimate = Estimate([one, two])
  estimate.started(one, 1.0)
  estimate.worked(one, 4, 0.0)  # it began at step 6
  estimate.worked(one, 2, 3.0)
  estimate.skip(two)
  assert estimate.fraction == pytest.approx(0.9)
  # 3 seconds were spent on 80 FLOP, 60 of them before this sitting.
  assert estimate.seconds_left() <= 3.0


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (3725, "1:02:05")])
def test_minutes(seconds, text):
  assert progress_lib._minutes(seconds) == text


def show(terminal):
  console = rich.console.Console(file=io.StringIO(), width=110,
                                 force_terminal=terminal)
  jobs = [job("wide"), job("deep", steps=2)]
  with Progress(console, jobs) as progress:
    with progress.stage("reading data"):
      pass
    progress.skip(jobs[0])
    with progress.running(jobs[1]) as on_step:
      on_step(1, {"loss": 2.5, "tokens_per_second": 1234.0})
      on_step(2, {"loss": 2.25})
  return console.file.getvalue()


def test_lines_where_there_is_no_terminal():
  lines = show(False).splitlines()
  assert lines[0] == "  0%  reading data  (0/2 runs)"
  assert lines[-1].startswith("100%  deep  seed 0  done  (2/2 runs, 0:00 left")
  assert len(lines) <= 4 and "\x1b" not in "".join(lines)


def test_bars_on_a_terminal():
  text = show(True)
  assert "whole ablation" in text and "2/2 runs" in text
  assert "step 2/2  loss 2.250" in text


def test_a_run_without_steps_says_nothing_of_the_time_left():
  """It diverged at its first step, or was finished but for its result."""
  console = rich.console.Console(file=io.StringIO(), width=110)
  with Progress(console, [job("wide"), job("deep")]) as progress:
    with progress.running(job("wide")):
      pass
  line = console.file.getvalue().splitlines()[-1]
  assert "1/2 runs" in line and "left" not in line
