"""Sets what was measured against the baseline and against published claims.

One family: every arm's held-out loss against the baseline, and every pair
that a claim needs. It is fixed by the plan, before anything is measured, and
all of it counts in the correction.
"""

import dataclasses
import math

import numpy as np

from experiments import scaling
from experiments import statistics
from experiments.claims import Claim, METRICS
from experiments.results import Results
from experiments.statistics import Difference

AGREES = "agrees"
DISAGREES = "disagrees"
CANNOT_TELL = "cannot be told at this size"
PRIMARY = "eval_loss"


@dataclasses.dataclass(frozen=True)
class Comparison:
  """metric of arm a against arm b.

  difference: a - b, or log(a / b) for metrics compared as ratios; None when
  one of the two was not measured, and then missing says what.
  holm: p-value adjusted over the family.
  """
  metric: str
  a: str
  b: str
  difference: Difference | None = None
  holm: float | None = None
  missing: str = ""

  @property
  def direction(self) -> int:
    if self.difference is None:
      return 0
    if METRICS[self.metric].source == "exact":
      return int(np.sign(self.difference.mean))
    return self.difference.direction


@dataclasses.dataclass(frozen=True)
class Verdict:
  claim: Claim
  verdict: str
  rule: str
  comparisons: tuple[Comparison, ...]


@dataclasses.dataclass(frozen=True)
class Analysis:
  """seeds: those that every arm with a result has finished.

  warnings: what is missing. against_baseline: [arm]. family: how many
  comparisons share the correction. fit: of the ablation's trend, if it has one
  and there is enough to fit.
  """
  seeds: tuple[int, ...]
  warnings: tuple[str, ...]
  against_baseline: dict[str, Comparison]
  verdicts: tuple[Verdict, ...]
  family: int
  fit: scaling.Fit | None = None


def analyse(results: Results) -> Analysis:
  ablation = results.ablation
  seeds = shared_seeds(results)
  others = [
      arm.name for arm in ablation.arms if arm.name != ablation.baseline]
  wanted = {(PRIMARY, name, ablation.baseline): None for name in others}
  for claim in ablation.claims:
    wanted.update(dict.fromkeys(claim_pairs(claim)))
  # The same two arms in the other order are the same comparison.
  family = {
      (metric, frozenset((a, b))) for metric, a, b in wanted
      if METRICS[metric].source != "exact"}
  done = {
      key: _compare(results, seeds, *key, max(len(family), 1))
      for key in wanted}
  done = _adjust(done, family)
  return Analysis(
      seeds, tuple(_warnings(results, seeds)),
      {name: done[PRIMARY, name, ablation.baseline] for name in others},
      tuple(_judge(claim, [done[key] for key in claim_pairs(claim)])
            for claim in ablation.claims),
      len(family), _fit(results, seeds))


def _fit(results, seeds):
  trend = results.ablation.trend
  return trend and scaling.fit(trend, {
      arm: {seed: run.value(PRIMARY) for seed, run in runs.items()
            if not run.failure} for arm, runs in results.runs.items()}, seeds)


def shared_seeds(results: Results) -> tuple[int, ...]:
  """Seeds that every arm with at least one finished run has finished."""
  finished = [
      {seed for seed, run in runs.items() if not run.failure}
      for runs in results.runs.values()]
  finished = [seeds for seeds in finished if seeds]
  if not finished:
    return ()
  return tuple(sorted(set.intersection(*finished)))


def values(results: Results, arm: str, metric: str, seeds=()) -> list[float]:
  """What was measured: one value a seed, the repeats, or the exact value."""
  source = METRICS[metric].source
  if source == "seeds":
    runs = results.runs[arm]
    found = [
        runs[seed].value(metric) for seed in seeds
        if seed in runs and not runs[seed].failure]
    return [value for value in found if value is not None]
  value = getattr(results.speeds[arm], metric)
  if source == "repeats":
    return list(value)
  return [] if value is None else [value]


def claim_pairs(claim: Claim) -> list[tuple[str, str, str]]:
  """(metric, a, b); the claim says how a stands to b."""
  if claim.kind != "monotone":
    return [(claim.metric, *claim.arms)]
  return [
      (claim.metric, after, before)
      for before, after in zip(claim.arms, claim.arms[1:])]


def _compare(results, seeds, metric, a, b, comparisons) -> Comparison:
  kind = METRICS[metric]
  sides = [values(results, arm, metric, seeds) for arm in (a, b)]
  wanted = len(seeds) if kind.source == "seeds" else 1
  missing = [
      arm for arm, side in zip((a, b), sides) if len(side) < max(wanted, 1)]
  if missing:
    return Comparison(metric, a, b, missing=(
        f"no {kind.label} for {' and '.join(missing)}"))
  if kind.ratio:
    if min(min(side) for side in sides) <= 0:
      return Comparison(metric, a, b, missing=(
          f"{kind.label} is not above zero, so it has no ratio"))
    sides = [[math.log(value) for value in side] for side in sides]
  if kind.source == "exact":
    difference = Difference(sides[0][0] - sides[1][0], 1, note="exact")
  elif kind.source == "seeds":
    difference = statistics.paired_difference(
        *(dict(zip(seeds, side)) for side in sides), comparisons)
  else:
    difference = statistics.independent_difference(*sides, comparisons)
  return Comparison(metric, a, b, difference)


def _adjust(done, family):
  """Adds Holm's p-values; a comparison without one counts with p = 1."""
  p_values = dict.fromkeys(family, 1.0)
  for (metric, a, b), comparison in done.items():
    if comparison.difference and comparison.difference.p_value is not None:
      p_values[metric, frozenset((a, b))] = comparison.difference.p_value
  adjusted = dict(zip(p_values, statistics.holm(list(p_values.values()))))
  return {
      key: dataclasses.replace(
          comparison, holm=adjusted[key[0], frozenset(key[1:])])
      if comparison.difference and comparison.difference.p_value is not None
      else comparison
      for key, comparison in done.items()}


def _judge(claim: Claim, comparisons: list[Comparison]) -> Verdict:
  exact = METRICS[claim.metric].source == "exact"
  what = "value" if exact else "whole interval"
  if claim.kind == "equal":
    verdict = _judge_equal(claim, comparisons[0], exact)
    rule = (f"agrees if the {what} lies within the margin, disagrees if it "
            "lies outside")
    return Verdict(claim, verdict, rule, tuple(comparisons))
  if claim.kind == "monotone":
    sign = -1 if METRICS[claim.metric].lower_is_better else 1
    rule = (f"agrees if every step's {what} is an improvement, disagrees if "
            f"any step's {what} is {'no improvement' if exact else 'a loss'}")
  else:
    sign = -1 if claim.kind == "less" else 1
    no_change = "1" if METRICS[claim.metric].ratio else "0"
    side, other = ("below", "above")[::-sign]
    rule = (f"agrees if the {what} is {side} {no_change}, disagrees if it is "
            f"{f'not {side}' if exact else other} {no_change}")
  directions = [comparison.direction for comparison in comparisons]
  measured = [comparison.difference is not None for comparison in comparisons]
  against = [
      found and (direction == -sign or exact and direction == 0)
      for found, direction in zip(measured, directions)]
  if any(against):
    verdict = DISAGREES
  elif all(direction == sign for direction in directions):
    verdict = AGREES
  else:
    verdict = CANNOT_TELL
  return Verdict(claim, verdict, rule, tuple(comparisons))


def _judge_equal(claim: Claim, comparison: Comparison, exact: bool) -> str:
  difference = comparison.difference
  if difference is None or (difference.low is None and not exact):
    return CANNOT_TELL
  low, high = (
      (difference.mean,) * 2 if exact else (difference.low, difference.high))
  if METRICS[claim.metric].ratio:
    low, high = math.expm1(low), math.expm1(high)
  if -claim.margin <= low and high <= claim.margin:
    return AGREES
  if high < -claim.margin or low > claim.margin:
    return DISAGREES
  return CANNOT_TELL


def _warnings(results: Results, seeds):
  """What is missing from the plan, in sentences."""
  ablation = results.ablation
  for arm in ablation.arms:
    runs = results.runs[arm.name]
    absent = [seed for seed in ablation.seeds if seed not in runs]
    if absent:
      yield (f"{arm.name}: {len(absent)} of {len(ablation.seeds)} seeds not "
             f"finished ({', '.join(map(str, absent))})")
    for seed, run in sorted(runs.items()):
      if run.failure:
        yield f"{arm.name}: seed {seed} failed: {run.failure}"
  if len(seeds) < len(ablation.seeds):
    if seeds:
      yield ("All figures below use only the seeds that every arm with a "
             f"result has finished: {', '.join(map(str, seeds))}")
    else:
      yield "No seed is finished by every arm, so nothing can be compared"
