"""Results as data: there and back, rounded, stale; and the suite's report."""
import dataclasses
import json
import re

import pytest

from experiments import measured
from experiments import results as results_lib
from experiments import suite
from experiments import suite_report
from experiments import verdicts
from experiments.results import Run, Speed
from experiments.scaling import Trend

KEPT = sorted(measured.DIRECTORY.glob("*.jsonl"))


@pytest.fixture
def workdir(tmp_path):
  """A finished ablation of the minute budget, but for the training."""
  name = "few_vs_many_experts"
  module = measured.load_config(suite.experiments()[name])
  config = module.get_config("minute")
  design = module.get_design(config)
  arms = list(design.models)
  ablation = dataclasses.replace(
      measured.plan.ablation(config, design, name,
                             dict.fromkeys(arms, 1e-3), "text", "command"),
      trend=Trend("granularity", dict(zip(arms, (1, 2, 4))), 0.58, "somebody"))
  workdir = tmp_path / "run"
  results_lib.write(results_lib.ablation_path(workdir), ablation)
  for i, arm in enumerate(arms):
    results_lib.write(results_lib.speed_path(workdir, arm), Speed(
        [101.23456789], [55.0], 1 << 20, 96.0))
    for seed in config.seeds:
      loss = 2.5 - 0.1 * i + 0.01 * seed + 1e-9 + 1e-3 * (i == seed)
      results_lib.write(results_lib.run_path(workdir, arm, seed), Run(
          loss, 3.5, 1000.0, measured={"late_loss": loss - 0.1},
          series={"loss by position": [[2.0, 3.0], [10.0, loss]]}))
      lines = [{"step": step, "tokens": 10 * step, "loss": 3.0,
                "grad_norm": 1.0, **({"eval_loss": loss + 1 / step}
                                     if step % 2 == 0 else {})}
               for step in range(1, 9)]
      results_lib.metrics_path(workdir, arm, seed).write_text(
          "".join(json.dumps(line) + "\n" for line in lines))
  return workdir


def test_there_and_back(workdir, tmp_path):
  path = measured.record(workdir, tmp_path)
  assert path.name == "few_vs_many_experts-minute.jsonl"
  before, after = results_lib.read_results(workdir), measured.read(path)
  assert after.ablation.arms[0].identity
  assert list(after.runs) == list(before.runs)
  arm = list(after.runs)[1]
  assert after.runs[arm][0].eval_loss == 2.4  # six digits
  assert after.runs[arm][1].series == {
      "loss by position": [[2.0, 3.0], [10.0, 2.411]]}
  assert after.speeds[arm].prefill_tokens_per_second == [101.235]
  assert [set(line) for line in after.curves[arm][1]] == 4 * [
      {"step", "tokens", "loss", "eval_loss"}]
  one, other = verdicts.analyse(before), verdicts.analyse(after)
  assert [v.verdict for v in one.verdicts] == [v.verdict for v in other.verdicts]
  assert one.fit.exponent == pytest.approx(other.fit.exponent, rel=1e-2)
  # One line each for the plan, an arm, and an arm's seed.
  assert len(path.read_text().splitlines()) == 1 + 3 + 3 * 2


def test_an_unfinished_ablation_is_not_kept(workdir, tmp_path):
  arm = results_lib.read_ablation(workdir).arms[2].name
  results_lib.run_path(workdir, arm, 1).unlink()
  with pytest.raises(ValueError, match=f"not finished: {arm}, seed 1"):
    measured.record(workdir, tmp_path)
  assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("damage", [
    lambda text: text[:len(text) // 2], lambda text: "",
    lambda text: text.replace('"eval_loss"', '"loss"', 1),
    lambda text: text.split("\n", 1)[1]])
def test_a_damaged_file_is_named(workdir, tmp_path, damage):
  path = measured.record(workdir, tmp_path)
  path.write_text(damage(path.read_text()))
  with pytest.raises(ValueError, match=f"{path.name}.*record the ablation"):
    measured.read(path)


def test_rows_of_another_config_are_stale(workdir, tmp_path):
  found = measured.read(measured.record(workdir, tmp_path))
  config = suite.experiments()["few_vs_many_experts"]
  assert measured.stale_arms(found, config) == []
  changed = tmp_path / config.name
  changed.write_text(config.read_text().replace(
      '"sliding_window": 128', '"sliding_window": 64'))
  assert len(measured.stale_arms(found, changed)) == 3


def test_the_report_of_the_suite(workdir, tmp_path):
  config = suite.experiments()["few_vs_many_experts"]
  with pytest.raises(ValueError, match="holds no results"):
    suite_report.write({"few_vs_many_experts": config}, tmp_path)
  measured.record(workdir, tmp_path / "measured")
  paths = suite_report.write({"few_vs_many_experts": config}, tmp_path)
  html, text = (path.read_text() for path in paths)
  assert "STALE" not in text and "Stale" not in html
  for page in (html, text):
    assert "16of2_shared" in page and "granularity" in page
  assert not re.search(r'(src|href)="https?:', html)
  picture = re.search(r"\((figures/.*\.png)\)", text)[1]
  assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
  assert [path.read_text() for path in suite_report.write(
      {"few_vs_many_experts": config}, tmp_path)] == [html, text]


def test_what_is_stale_says_so(workdir, tmp_path):
  config = suite.experiments()["few_vs_many_experts"]
  ablation = results_lib.read_ablation(workdir)
  old = dataclasses.replace(ablation, arms=[
      dataclasses.replace(ablation.arms[0], identity="before"),
      *ablation.arms[1:]])
  results_lib.write(results_lib.ablation_path(workdir), old)
  measured.record(workdir, tmp_path / "measured")
  html, text = (path.read_text() for path in suite_report.write(
      {"few_vs_many_experts": config}, tmp_path))
  assert text.count("Stale.") == 1  # in the overview
  assert "STALE.** Measured with another config than there is today: 8of1." in (
      text)
  assert "Stale." in html


def test_the_suite_refuses_what_it_does_not_know(capsys):
  assert suite.main(["width_vs_dept"]) == 2
  assert "width_vs_dept: no such experiment; there are width_vs_depth" in (
      capsys.readouterr().err)
  with pytest.raises(SystemExit) as error:
    suite.main(["--budget", "hour"])
  assert error.value.code == 2


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_what_is_kept_is_of_todays_configs(path):
  """A config that changes makes its rows stale: run it again, or say in the
  report that they are (python -m experiments.suite --report)."""
  found = measured.read(path)
  stale = measured.stale_arms(found, suite.experiments()[found.ablation.name])
  report = (measured.DIRECTORY.parent / "RESULTS.md").read_text()
  for arm in stale:
    assert re.search(rf"STALE.*\b{re.escape(arm)}\b", report), (
        f"{path.name}: the rows of {arm} are stale")


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
  (tmp_path / "measured").symlink_to(measured.DIRECTORY)
  text = suite_report.write(suite.experiments(), tmp_path)[1].read_text()
  assert text == (measured.DIRECTORY.parent / "RESULTS.md").read_text()
