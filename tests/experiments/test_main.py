"""The command line: what it refuses, and an ablation killed and continued."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments import main as main_lib
from experiments import results
from quick import jax_options

ROOT = pathlib.Path(main_lib.__file__).parent.parent
CONFIG = ROOT / "experiments" / "configs" / "width_vs_depth.py"


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
  """Runs main in an empty directory: (exit status, stdout, stderr)."""
  monkeypatch.chdir(tmp_path)
  def run(*arguments):
    status = main_lib.main(["main", *arguments])
    return status, *capsys.readouterr()
  with jax_options():  # main tells this process where compiled programs go
    yield run


def test_no_arguments_print_the_usage(main):
  status, out, err = main()
  assert (status, out) == (2, "")
  assert "--config is missing" in err
  assert "experiments/configs/width_vs_depth.py: minute, laptop, gpu" in err
  assert "few_vs_many_experts.py" in err


def test_help_is_no_error(main):
  status, out, err = main("--help")
  assert (status, err) == (0, "") and "--workdir" in out


@pytest.mark.parametrize("arguments, message", [
    (["--confg", str(CONFIG)], "Unknown command line flag 'confg'"),
    (["--config", str(CONFIG), "more"], "'more' is no option"),
])
def test_wrong_usage_is_told_from_failure(main, arguments, message):
  status, _, err = main(*arguments)
  assert status == 2
  assert message in err and "--workdir" in err


@pytest.mark.parametrize("arguments, message", [
    ([f"{CONFIG}:hour"], "budget 'hour': use one of minute, laptop, gpu"),
    (["nowhere.py"], "--config nowhere.py: there is no such file"),
    ([f"{CONFIG}:minute", "--config.train.stepz=5"],
     'no entry \'stepz\'. Did you mean "steps"'),
    ([f"{CONFIG}:minute", "--config.trian.steps=5"],
     'no entry \'trian\'. Did you mean "train"'),
    ([f"{CONFIG}:minute", "--config.train.steps=many"],
     "--config.train.steps=many: invalid literal for int()"),
    ([f"{CONFIG}:minute", "--config.train.steps=1.5"], "steps=1.5"),
    ([f"{CONFIG}:minute", "--config.together=perhaps"], "'perhaps'"),
    ([f"{CONFIG}:minute", "--config.train=5"], "is not a dict"),
    ([f"{CONFIG}:minute", "--config.seeds=0,one"],
     "config.seeds=('0,one',): expected ints"),
    ([f"{CONFIG}:minute", "--config.model.moe_depths=(2, 4.5)"],
     "config.model.moe_depths=(2, 4.5): expected ints"),
    ([f"{CONFIG}:minute", "--config.seeds=()"], "config.seeds=()"),
    ([f"{CONFIG}:minute", "--config.train.steps=0"], "train steps=0"),
    ([f"{CONFIG}:minute", "--config.seeds=3,3"], "none twice"),
    ([f"{CONFIG}:minute", "--config.data.source=files:nowhere/*"],
     "nowhere"),
    ([f"{CONFIG}:minute", "--config.model.active_params=1e3"],
     "active_params=1,000 is out of reach"),
])
def test_failure_is_one_message(main, arguments, message):
  status, out, err = main("--config", *arguments)
  assert status == 1 and message in err, err
  assert err.startswith("error: ") and "Traceback" not in err


def test_a_file_without_a_design_is_refused(main, tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("import ml_collections\n"
                  "def get_config():\n"
                  "  return ml_collections.ConfigDict()\n")
  status, _, err = main("--config", "mine.py")
  assert status == 1 and "mine.py has no get_design(config)" in err


SMALL = (
    "--config.model.moe_depths=2", "--config.model.dense_depths=4",
    "--config.train.steps=6", "--config.train.checkpoint_every=2",
    "--config.train.log_every=1", "--config.train.eval_every=3",
    "--config.train.seq_len=64", "--config.optimizer.warmup_steps=2",
    "--config.speed.prompt_tokens=64", "--config.data.max_bytes=200000")


def start(workdir):
  environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                 "COLUMNS": "120"}
  return subprocess.Popen(
      [sys.executable, "-m", "experiments.main", "--config", f"{CONFIG}:minute",
       "--workdir", str(workdir), *SMALL], cwd=ROOT, env=environment,
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition, process):
  deadline = time.monotonic() + 300
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, "it takes too long"
    time.sleep(0.01)


@pytest.mark.slow
def test_an_ablation_is_killed_interrupted_and_finished(tmp_path):
  """The minute budget, with steps enough to be stopped between them."""
  first = results.run_path(tmp_path, "moe_2", 0)
  process = start(tmp_path)
  wait_for(lambda: first.exists() and results.read_metrics(
      results.metrics_path(tmp_path, "dense_4", 0)), process)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  finished = first.stat().st_mtime_ns

  second = results.metrics_path(tmp_path, "moe_2", 1)
  process = start(tmp_path)
  wait_for(lambda: results.read_metrics(second), process)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate()
  if not results.run_path(tmp_path, "moe_2", 1).exists():
    assert process.returncode == 130
    assert "saved at step" in err and "The same command continues" in err

  process = start(tmp_path)
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert first.stat().st_mtime_ns == finished
  found = results.read_results(tmp_path)
  assert found.ablation.name == "width_vs_depth"
  for arm in ("moe_2", "dense_4"):
    for seed in (0, 1):
      run, curve = found.runs[arm][seed], found.curves[arm][seed]
      assert not run.failure and 1 < run.eval_loss < 6
      assert [entry["step"] for entry in curve] == [1, 2, 3, 4, 5, 6]
      assert curve[-1]["eval_loss"] == pytest.approx(run.eval_loss)
    speed = found.speeds[arm]
    assert len(speed.prefill_tokens_per_second) == 3
    assert min(speed.decode_tokens_per_second) > 0
    assert speed.peak_memory_bytes > 4 * 3 * 1e5
  assert found.runs["moe_2"][0].router and not found.runs["dense_4"][0].router
  assert not list(tmp_path.glob("arms/*/*/checkpoints"))
  report = tmp_path / "report.html"
  assert str(report) in out and "held-out loss" in out
  assert "dense_4" in report.read_text()
  assert "moe_2" in (tmp_path / "report.md").read_text()
  assert "Traceback" not in err


def test_a_different_config_in_the_same_workdir_is_refused(main, tmp_path):
  results.write_bytes(tmp_path / "there" / "config.json", json.dumps(
      {"config.train.steps": 7}).encode())
  status, _, err = main("--config", f"{CONFIG}:minute", "--workdir", "there")
  assert status == 1
  assert "config.train.steps was 7, is 30" in err
  assert "another --workdir" in err
