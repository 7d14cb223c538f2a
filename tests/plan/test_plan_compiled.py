"""The estimate against programs that libtpu compiled, kept and made anew."""
import json

import pytest

from jaxlm.plan import figures
from jaxlm.plan.estimate import estimate
from jaxlm.plan.plan import by_compiling

KEPT = json.loads(figures.PATH.read_text())
JOBS = {figures.name_of(*job): job for job in figures.JOBS}


@pytest.mark.parametrize("name", KEPT)
def test_memory_is_estimated_within_a_tenth(name):
  found = estimate(figures.job_of(*JOBS[name]))
  assert found.total == pytest.approx(KEPT[name]["total"], rel=0.1)
  assert found.useful == pytest.approx(KEPT[name]["useful_flops"])


def test_what_was_compiled_fits_and_says_with_what():
  for plan in KEPT.values():
    assert plan["fits"] and plan["method"] == "compiled"
    assert set(plan["versions"]) == {"jax", "libtpu"}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["train", "decode"])
def test_compiled_anew(task, tmp_path, monkeypatch):
  pytest.importorskip("libtpu", reason="Linux on x86 alone has libtpu")
  monkeypatch.setenv("JAXLM_CACHE", str(tmp_path))
  name = next(name for name in JOBS if name.startswith(f"gpt2 {task}"))
  job = figures.job_of(*JOBS[name])
  plan = by_compiling(job)
  # Other versions schedule otherwise.
  assert plan.total == pytest.approx(KEPT[name]["total"], rel=0.03)
  assert plan.wire_bytes == pytest.approx(
      sum(row["bytes"] for row in KEPT[name]["wire"]), rel=0.1)
  assert plan.useful_flops < plan.executed_flops < 3 * plan.useful_flops
  again = by_compiling(job)
  assert again.total == plan.total and again.seconds["compile"] == (
      plan.seconds["compile"])  # kept
