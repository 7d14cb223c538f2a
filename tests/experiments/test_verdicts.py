"""Verdicts on claims, from results made by hand."""

import pytest

from experiments import results
from experiments import verdicts
from experiments import wording
from experiments.claims import Claim

SEEDS = (3, 4, 5, 6)
NOISE = (0.001, -0.002, 0.0, 0.001)
LOSSES = {"wide": 1.85, "base": 1.80, "deep": 1.75, "twin": 1.801}
SPEEDS = {"wide": 2400.0, "base": 2000.0, "deep": 1500.0, "twin": 2010.0}
BYTES = {"wide": 640, "base": 512, "deep": 512, "twin": 384}
AGREES, DISAGREES, CANNOT = (
    verdicts.AGREES, verdicts.DISAGREES, verdicts.CANNOT_TELL)


def make_results(*claims, runs=None, speeds=None):
  """Arms whose losses move together but for a noise of their own."""
  arms = [
      results.Arm(name, "", dict.fromkeys(
          ("total_params", "active_params", "flops_per_token"), 11), 0.1)
      for name in LOSSES]
  made = {}
  for place, arm in enumerate(LOSSES):
    own = NOISE[place:] + NOISE[:place]
    made[arm] = {
        seed: results.Run(
            LOSSES[arm] + 0.03 * seed + own[i], 2.5,
            SPEEDS[arm] * (1 + own[i] + 0.02 * seed),
            None if arm == "twin" else results.Router(
                [[0.5, 0.5]], [0.3 + own[i]], [0.7], 0.0))
        for i, seed in enumerate(SEEDS)}
    made[arm].update((runs or {}).get(arm, {}))
  timed = {
      arm: results.Speed(
          [9 * SPEEDS[arm] + i for i in (0, 2, 5)],
          [SPEEDS[arm] / 10 + i for i in (0, 40, 80)], BYTES[arm], 64)
      for arm in LOSSES}
  ablation = results.Ablation(
      "n", "q", "minute", SEEDS, "base", arms, (), (), "rule", "data",
      {"steps": 1, "batch_size": 1, "seq_len": 1, "tokens": 1}, claims, {}, {},
      "command")
  return results.Results(
      ablation, made, {arm: {} for arm in LOSSES}, {**timed, **(speeds or {})})


def judge(kind, arms, metric, margin=None, **changes):
  claim = Claim("text", "source", "published", kind, arms, metric, margin)
  (verdict,) = verdicts.analyse(make_results(claim, **changes)).verdicts
  return verdict


@pytest.mark.parametrize("kind, arms, metric, margin, expected", [
    ("less", ("deep", "wide"), "eval_loss", None, AGREES),
    ("greater", ("deep", "wide"), "eval_loss", None, DISAGREES),
    ("less", ("base", "twin"), "eval_loss", None, CANNOT),
    ("greater", ("base", "twin"), "eval_loss", None, CANNOT),
    ("equal", ("base", "twin"), "eval_loss", 0.02, AGREES),
    ("equal", ("base", "twin"), "eval_loss", 0.001, CANNOT),
    ("equal", ("base", "wide"), "eval_loss", 0.02, DISAGREES),
    ("equal", ("wide", "base"), "eval_loss", 0.02, DISAGREES),
    ("monotone", ("wide", "base", "deep"), "eval_loss", None, AGREES),
    ("monotone", ("wide", "twin", "base"), "eval_loss", None, CANNOT),
    ("monotone", ("base", "twin", "wide"), "eval_loss", None, DISAGREES),
    ("monotone", ("deep", "base", "wide"), "tokens_per_second", None, AGREES),
    ("equal", ("wide", "base"), "tokens_per_second", 0.21, AGREES),
    ("equal", ("wide", "base"), "tokens_per_second", 0.19, DISAGREES),
    ("greater", ("wide", "deep"), "prefill_tokens_per_second", None, AGREES),
    ("less", ("wide", "deep"), "prefill_tokens_per_second", None, DISAGREES),
    ("greater", ("wide", "deep"), "decode_tokens_per_second", None, CANNOT),
    ("less", ("twin", "base"), "max_vio", None, CANNOT),
    ("greater", ("wide", "deep"), "peak_memory_bytes", None, AGREES),
    ("less", ("wide", "deep"), "peak_memory_bytes", None, DISAGREES),
    ("less", ("base", "deep"), "peak_memory_bytes", None, DISAGREES),
    ("monotone", ("wide", "base", "twin"), "peak_memory_bytes", None, AGREES),
    ("monotone", ("wide", "base", "deep"), "peak_memory_bytes", None,
     DISAGREES),
    ("equal", ("wide", "base"), "peak_memory_bytes", 0.25, AGREES),
    ("equal", ("wide", "base"), "peak_memory_bytes", 0.24, DISAGREES),
    ("equal", ("wide", "base"), "kv_bytes_per_token", 0.01, AGREES),
])
def test_verdict(kind, arms, metric, margin, expected):
  assert judge(kind, arms, metric, margin).verdict == expected


def test_the_family_is_the_plan_and_counts_a_pair_once():
  def family(*claims, **changes):
    return verdicts.analyse(make_results(*claims, **changes)).family
  def claim(kind, arms, metric="eval_loss"):
    return Claim("t", "s", "p", kind, arms, metric)
  assert family() == 3
  assert family(claim("less", ("deep", "base"))) == 3
  assert family(claim("less", ("base", "deep"))) == 3
  assert family(claim("less", ("deep", "wide"))) == 4
  assert family(claim("monotone", ("wide", "deep", "base"))) == 4
  assert family(claim("less", ("deep", "base"), "tokens_per_second")) == 4
  assert family(claim("less", ("deep", "base"), "peak_memory_bytes")) == 3
  assert family(runs={"wide": dict.fromkeys(SEEDS, results.Run(failure="x"))}
                ) == 3


def test_more_claims_widen_the_intervals():
  few = verdicts.analyse(make_results())
  many = verdicts.analyse(make_results(
      Claim("t", "s", "p", "less", ("deep", "wide"), "eval_loss")))
  for arm in ("wide", "deep", "twin"):
    narrow, wide = (
        a.against_baseline[arm].difference for a in (few, many))
    assert wide.low < narrow.low and narrow.high < wide.high
    assert wide.mean == narrow.mean


def test_speeds_of_seeds_trained_together_are_no_pairs():
  same = {
      arm: {seed: results.Run(1.8, 2.5, SPEEDS[arm]) for seed in SEEDS}
      for arm in ("wide", "deep")}
  found = judge("greater", ("wide", "deep"), "tokens_per_second", runs=same)
  assert found.verdict == CANNOT
  assert "not 4 independent" in wording.finding(found.comparisons[0])


def test_a_speed_measured_once_is_stated_and_not_judged():
  once = {"wide": results.Speed([900.0]), "deep": results.Speed([300.0])}
  found = judge("greater", ("wide", "deep"), "prefill_tokens_per_second",
                speeds=once)
  assert found.verdict == CANNOT
  assert wording.finding(found.comparisons[0]) == (
      "prefill speed, wide against deep: 3.00\u00d7 "
      "(measured once, so there is no interval)")
  found = judge("greater", ("wide", "deep"), "peak_memory_bytes", speeds=once)
  assert found.verdict == CANNOT
  assert found.comparisons[0].missing == "no peak memory for wide and deep"


def test_a_step_against_the_claim_decides_even_if_another_is_missing():
  lost = dict.fromkeys(SEEDS, results.Run(failure="loss is nan at step 2"))
  found = judge("monotone", ("deep", "base", "wide"), "eval_loss",
                runs={"wide": lost})
  assert found.verdict == DISAGREES
  found = judge("monotone", ("base", "deep", "wide"), "eval_loss",
                runs={"wide": lost})
  assert found.verdict == CANNOT


def test_shared_seeds_leave_failed_runs_out():
  failed = results.Run(failure="loss is nan at step 2")
  lost = dict.fromkeys(SEEDS, failed)
  analysis = verdicts.analyse(make_results(
      runs={"wide": {4: failed}, "twin": lost}))
  assert analysis.seeds == (3, 5, 6)
  assert analysis.against_baseline["twin"].difference is None
  assert "wide: seed 4 failed: loss is nan at step 2" in analysis.warnings
  pairs = [NOISE[(i + 2) % 4] - NOISE[(i + 1) % 4] - 0.05 for i in (0, 2, 3)]
  assert analysis.against_baseline["deep"].difference.mean == pytest.approx(
      sum(pairs) / 3)


@pytest.mark.parametrize("fraction, text", [
    (0, "exactly"), (0.00012, "0.012 %"), (0.0349, "3.5 %"), (0.181, "18 %"),
    (3.0, "300 %")])
def test_percent(fraction, text):
  assert wording.percent(fraction) == text
