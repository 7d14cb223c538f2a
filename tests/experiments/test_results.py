"""The files between runner and report."""

import dataclasses
import json
import math

import pytest

from experiments import results
from experiments.claims import Claim

COUNTS = {"total_params": 1201, "active_params": 307, "flops_per_token": 1843}
ARMS = tuple(
    results.Arm(name, "an arm", {**COUNTS, "num_layers": 3}, 0.002)
    for name in ("coarse", "fine"))
CLAIM = Claim("Finer is better", "a paper", "2 %", "less", ("fine", "coarse"),
              "eval_loss")


def make_ablation(**changes):
  fields = dict(
      name="n", question="q?", budget="minute", seeds=(0, 1), baseline="coarse",
      arms=ARMS, held_equal=[results.Held("total_params", 1200, 0.0008)],
      not_held=[results.Held("d_ff", 7, 0.2, "whole numbers", ("fine",))],
      learning_rate_rule="one for all", data="bytes",
      train={"steps": 5, "batch_size": 2, "seq_len": 17, "tokens": 170},
      claims=[CLAIM], versions={"jax": "0"}, hardware={"cores": 2}, command="x")
  return results.Ablation(**{**fields, **changes})


def test_files_come_back_as_they_were_written(tmp_path):
  run = results.Run(1.5, 2.25, 310.0, results.Router(
      [[0.5, 0.25, 0.25], [0.75, 0.125, 0.125]], [0.5, 1.25], [1.0, 0.7], 0.01))
  failed = results.Run(failure="loss is nan at step 3")
  speed = results.Speed([5.0, 6.0], [7.0], None, 96)
  results.write(results.ablation_path(tmp_path), make_ablation())
  results.write(results.run_path(tmp_path, "fine", 1), run)
  results.write(results.run_path(tmp_path, "coarse", 0), failed)
  results.write(results.speed_path(tmp_path, "fine"), speed)
  lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
  results.metrics_path(tmp_path, "fine", 1).write_text(
      "".join(json.dumps(line) + "\n" for line in lines))
  found = results.read_results(tmp_path)
  assert found.ablation == make_ablation()
  assert found.runs == {"coarse": {0: failed}, "fine": {1: run}}
  assert found.runs["fine"][1].value("max_vio") == 0.875
  assert failed.value("max_vio") is None
  assert found.speeds == {"coarse": results.Speed(), "fine": speed}
  assert found.curves["fine"] == {0: [], 1: lines}


@pytest.mark.parametrize("changes", [
    {"eval_loss": None}, {"eval_loss": math.nan}, {"bits_per_byte": math.inf}])
def test_a_finished_run_has_finite_numbers(changes):
  with pytest.raises(ValueError, match=f"{[*changes][0]}=.*finite number"):
    results.Run(**{"eval_loss": 1.0, "bits_per_byte": 1.4,
                   "tokens_per_second": 9.0, **changes})


def test_metrics_of_a_killed_and_resumed_run(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(
      '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n'
      '{"step": 2, "loss": 2.4}\n{"step": 3, "lo')
  assert results.read_metrics(path) == [
      {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.4}]
  assert results.read_metrics(tmp_path / "none.jsonl") == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
  path = results.speed_path(tmp_path, "fine")
  results.write(path, results.Speed(kv_bytes_per_token=96))
  before = path.read_bytes()
  with pytest.raises(ValueError):
    results.write(path, results.Speed(kv_bytes_per_token=math.nan))
  assert path.read_bytes() == before
  assert [p.name for p in path.parent.glob(".*")] == []


@pytest.mark.parametrize("changes, message", [
    ({"baseline": "depth-3"}, "baseline='depth-3' is not one of"),
    ({"seeds": ()}, "seeds=..: name at least one"),
    ({"seeds": (1, 1)}, "none twice"),
    ({"train": {"steps": 3}}, "train lacks 'batch_size'"),
    ({"claims": [dataclasses.replace(CLAIM, arms=("fine", "deep"))]},
     r"Claim names arms \['deep'\]"),
])
def test_bad_plans_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    make_ablation(**changes)


def test_arm_names_stay_inside_the_directory():
  with pytest.raises(ValueError, match="becomes a directory"):
    dataclasses.replace(ARMS[0], name="../x")
