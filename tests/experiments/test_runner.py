"""Ablations of tiny models, whole: paired, resumed, refused, failed."""
import dataclasses
import io
import math

import jax
import pytest
import rich.console

from experiments import design as design_lib
from experiments import plan
from experiments import results
from experiments import runner
from experiments import speed
from experiments.budget import Solution, measure
from experiments.claims import Claim
from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          RopeConfig)
from jaxlm.model import costs

pytestmark = pytest.mark.usefixtures("quick_compile")
SEQ_LEN, STEPS, SEEDS = 19, 12, (3, 5)


def model(d_model, d_ff):
  return ModelConfig(
      vocab_size=260, d_model=d_model, num_layers=1, mlp=MLPConfig(d_ff),
      attention=AttentionConfig(3, 1, 8, rope_full=RopeConfig()),
      tie_embeddings=True)


# "twin" is "small" by another name, and needs no programs of its own.
MODELS = {"small": model(10, 23), "twin": model(10, 23), "large": model(20, 7)}


def make_design(*arms):
  def solved(config):
    found = measure(config, SEQ_LEN)
    return Solution(config, {}, {"total_params": found["total_params"]}, found,
                    {"total_params": 0.0})
  return design_lib.Design(
      "Which is better?", arms[0], {arm: solved(MODELS[arm]) for arm in arms},
      {arm: f"the {arm} one" for arm in arms},
      (Claim("Large is better", "nobody", "", "less", (arms[1], arms[0]),
             "eval_loss"),))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Files that count."""
  directory = tmp_path_factory.mktemp("text")
  for i in range(30):
    (directory / f"{i}.txt").write_text(
        " ".join(str((7 * i + j) % 97) for j in range(60)))
  return f"files:{directory}/*.txt"


@pytest.fixture
def config(source):
  return design_lib.make_config({}, {"tiny": {
      "seeds": SEEDS,
      "data": {"source": source, "heldout_fraction": 0.2},
      "train": {"steps": STEPS, "batch_size": 4, "seq_len": SEQ_LEN,
                "eval_batches": 2, "log_every": 1, "eval_every": 6,
                "checkpoint_every": 5},
      "optimizer": {"warmup_steps": 2},
      "learning_rate": {"base": 1e-2, "reference_d_model": 10},
      "speed": {"prompt_tokens": 11, "new_tokens": 5, "repeats": 2,
                "seconds": 1e-3},
  }}, "tiny")


def run(config, workdir, *arms):
  """The results, and what was printed."""
  console = rich.console.Console(file=io.StringIO(), width=100)
  runner.run("tiny", config, make_design(*arms), workdir, console=console)
  return results.read_results(workdir), console.file.getvalue()


def result_files(workdir):
  return {str(path.relative_to(workdir)): path.stat().st_mtime_ns
          for path in workdir.glob("arms/**/*.json")}


def test_arms_are_paired_by_seed(config, tmp_path):
  found, printed = run(config, tmp_path, "small", "twin", "large")
  losses = {
      arm: {seed: [entry["loss"] for entry in curve]
            for seed, curve in curves.items()}
      for arm, curves in found.curves.items()}
  # The same model on the same data, seed by seed; and not between seeds.
  assert losses["small"] == losses["twin"]
  assert losses["small"][3] != losses["small"][5]
  assert losses["small"][3] != losses["large"][3]
  for arm, runs in found.runs.items():
    for seed in SEEDS:
      assert runs[seed].eval_loss < losses[arm][seed][0]
  rates = {arm.name: arm.learning_rate for arm in found.ablation.arms}
  assert rates["large"] == pytest.approx(rates["small"] / 2 ** 0.5)
  assert "6/6 runs" in printed and "held-out loss" in printed
  assert not list(tmp_path.glob("arms/*/*/checkpoints"))


def test_speed_and_memory_are_measured(config, tmp_path):
  found, _ = run(config, tmp_path, "small", "large")
  for arm, measured in found.speeds.items():
    for timings in (measured.prefill_tokens_per_second,
                    measured.decode_tokens_per_second):
      assert len(timings) == 2 and min(timings) > 0
    params = costs.parameter_counts(MODELS[arm]).total
    # Parameters, two moments and at least one gradient, in float32.
    assert 16 * params < measured.peak_memory_bytes < 16 * params + 5e6
    assert measured.kv_bytes_per_token == 2 * 8 * 2


def test_what_is_finished_is_not_done_again(config, tmp_path):
  first, _ = run(config, tmp_path, "small", "twin")
  before = result_files(tmp_path)
  gone = results.run_path(tmp_path, "twin", 5)
  gone.unlink()
  second, printed = run(config, tmp_path, "small", "twin")
  after = result_files(tmp_path)
  assert [path for path in after if after[path] != before[path]] == [
      str(gone.relative_to(tmp_path))]
  assert "twin  seed 5" in printed and "small  seed" not in printed
  again, once = (found.runs["twin"][5] for found in (second, first))
  assert again.eval_loss == once.eval_loss
  assert second.curves["twin"][5][-1]["loss"] == (
      first.curves["twin"][5][-1]["loss"])


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    config, tmp_path, monkeypatch):
  whole, _ = run(config, tmp_path / "whole", "small", "twin")
  real = runner.train
  def interrupted(*arguments, on_step, **options):
    def stop(step, metrics):
      on_step(step, metrics)
      if step == 8:
        raise KeyboardInterrupt
    return real(*arguments, on_step=stop, **options)
  monkeypatch.setattr(runner, "train", interrupted)
  with pytest.raises(KeyboardInterrupt):
    run(config, tmp_path / "parts", "small", "twin")
  assert results.read_run(tmp_path / "parts", "small", 3) is None
  steps = []
  def watched(*arguments, on_step, **options):
    def note(step, metrics):
      steps.append(step)
      on_step(step, metrics)
    return real(*arguments, on_step=note, **options)
  monkeypatch.setattr(runner, "train", watched)
  parts, _ = run(config, tmp_path / "parts", "small", "twin")
  assert steps[0] == 6  # a checkpoint is written every 5
  losses = lambda found: [
      found.runs[arm][seed].eval_loss for arm in ("small", "twin")
      for seed in SEEDS]
  assert losses(parts) == losses(whole)


def test_another_config_or_other_data_is_refused(config, source, tmp_path):
  config.data.source = f"files:{tmp_path}/*.txt"
  for i in range(12):
    (tmp_path / f"{i}.txt").write_text("one two three " * (i + 5))
  workdir = tmp_path / "run"
  run(config, workdir, "small", "twin")
  before = result_files(workdir)
  other = config.copy_and_resolve_references()
  other.train.batch_size = 6
  with pytest.raises(ValueError, match=r"config.train.batch_size was 4, is 6"
                     ".*another --workdir"):
    run(other, workdir, "small", "twin")
  with pytest.raises(ValueError, match="arms.twin.*is absent"):
    run(config, workdir, "small", "large")
  (tmp_path / "3.txt").write_text("four five six " * 9)
  with pytest.raises(ValueError, match="begun with other data"):
    run(config, workdir, "small", "twin")
  assert result_files(workdir) == before


def test_a_mistaken_source_does_not_claim_the_workdir(config, tmp_path):
  source = config.data.source
  config.data.source = f"files:{tmp_path}/nothing/*"
  with pytest.raises(ValueError, match="nothing"):
    run(config, tmp_path, "small", "twin")
  assert not list(tmp_path.iterdir())
  config.data.source = source
  run(config, tmp_path, "small", "twin")


def test_a_failed_run_is_reported_and_the_others_go_on(config, tmp_path):
  # The large arm's rate is 2 ** 30 times the small one's.
  config.learning_rate.exponent = -30.0
  config.optimizer.clip_norm = 0.0
  found, printed = run(config, tmp_path, "small", "large")
  for seed in SEEDS:
    assert not found.runs["small"][seed].failure
    failure = found.runs["large"][seed].failure
    assert failure.startswith("step ") and "loss" in failure
  assert "large, seed 3 failed: step" in printed
  assert "failed" in (tmp_path / "report.md").read_text()
  again, printed = run(config, tmp_path, "small", "large")
  assert again.runs == found.runs and "compiling" not in printed


def test_seeds_train_together(config, tmp_path):
  apart, _ = run(config, tmp_path / "apart", "small", "twin")
  config.together = True
  together, printed = run(config, tmp_path / "together", "small", "twin")
  assert "2/2 runs" in printed
  for arm in ("small", "twin"):
    for seed in SEEDS:
      assert together.runs[arm][seed].eval_loss == pytest.approx(
          apart.runs[arm][seed].eval_loss, rel=1e-3)
  assert not list((tmp_path / "together").glob("arms/*/seeds_*"))


def test_a_seed_that_fails_does_not_take_the_others_with_it(
    config, tmp_path, monkeypatch):
  real = runner.train
  def train(*arguments, seeds, **options):
    if 5 in seeds:
      raise runner.Diverged(4, math.nan, "loss is nan (seed 5)")
    return real(*arguments, seeds=seeds, **options)
  monkeypatch.setattr(runner, "train", train)
  config.together = True
  found, _ = run(config, tmp_path, "small", "twin")
  for runs in found.runs.values():
    assert not runs[3].failure
    assert runs[5].failure == "step 4: loss is nan (seed 5)"


def test_checkpoints_are_kept_when_asked(config, tmp_path):
  config.keep_checkpoints = True
  run(config, tmp_path, "small", "twin")
  for arm in ("small", "twin"):
    for seed in SEEDS:
      steps = results.run_dir(tmp_path, arm, seed) / "checkpoints"
      assert (steps / str(STEPS)).is_dir()


def test_learning_rates_are_tuned_with_a_seed_of_their_own(config, tmp_path):
  config.learning_rate.update({
      "method": "grid", "grid": (1e-5, 1e-2), "steps": 9, "seed": 77})
  found, printed = run(config, tmp_path, "small", "twin")
  assert "8/8 runs" in printed
  assert [arm.learning_rate for arm in found.ablation.arms] == [1e-2, 1e-2]
  assert "(1e-05, 0.01)" in found.ablation.learning_rate_rule
  tuned = results.read_run(tmp_path / "tuning" / "0.01", "twin", 77)
  assert tuned.eval_loss < results.read_run(
      tmp_path / "tuning" / "1e-05", "twin", 77).eval_loss
  assert 77 not in found.runs["twin"]
  _, printed = run(config, tmp_path, "small", "twin")
  assert "tuning, learning rate" not in printed


def test_a_rate_at_the_end_of_the_grid_is_admitted(config):
  config.learning_rate.update({"method": "grid", "grid": (1e-3, 2e-3, 4e-3)})
  text = plan.explain_rates(config, {"a": 2e-3, "b": 4e-3, "c": 1e-3})
  assert "At an end of the grid, so perhaps not the best: b, c." in text


def test_a_grid_on_which_an_arm_always_diverges_is_refused(
    config, tmp_path, monkeypatch):
  def train(*arguments, **options):
    raise runner.Diverged(4, math.nan, "loss is nan")
  monkeypatch.setattr(runner, "train", train)
  config.learning_rate.update({
      "method": "grid", "grid": (1e8, 1e9), "steps": 9, "seed": 77})
  with pytest.raises(ValueError, match="small diverged at every rate"):
    run(config, tmp_path, "small", "twin")


def test_an_ablation_of_an_older_layout_is_refused(config, tmp_path):
  (tmp_path / "ablation.json").write_text("{}")
  with pytest.raises(ValueError, match="without config.json"):
    run(config, tmp_path, "small", "twin")
  assert not (tmp_path / "config.json").exists()


def test_a_later_sitting_is_recorded(config, tmp_path):
  found, _ = run(config, tmp_path, "small", "twin")
  before = dataclasses.replace(
      found.ablation, versions={**found.ablation.versions, "jax": "0.1.2"})
  results.write(results.ablation_path(tmp_path), before)
  again, _ = run(config, tmp_path, "small", "twin")
  assert again.ablation.versions["jax"] == f"0.1.2, then {jax.__version__}"


def test_a_damaged_config_file_is_named(config, tmp_path):
  (tmp_path / "config.json").write_text('{"config.train')
  with pytest.raises(ValueError, match="config.json is damaged"):
    run(config, tmp_path, "small", "twin")


def test_only_arms_with_a_router_are_balanced(config):
  moe = dataclasses.replace(
      MODELS["small"], mlp=None, moe=MoEConfig(5, 2, MLPConfig(7)))
  assert plan.train_config(config, moe, 1e-3).balancing.switch == 0.01
  dense = plan.train_config(config, MODELS["small"], 1e-3)
  assert not dense.balancing.weights


def test_timings_alternate_between_arms(config):
  """So that a slow moment of the machine slows all of them."""
  train_configs = {arm: plan.train_config(config, MODELS[arm], 1e-3)
                   for arm in ("small", "twin")}
  told = []
  speed.measure({arm: MODELS[arm] for arm in train_configs}, train_configs,
                on_arm=told.append, **config.speed)
  assert told[2:] == ["small: 1/2", "twin: 1/2", "small: 2/2", "twin: 2/2"]
