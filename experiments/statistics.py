"""Paired differences with confidence intervals, corrected for their number.

All intervals of one report are simultaneous (Bonferroni): with m comparisons
each has the confidence 1 - 0.05 / m, so that with 95 % certainty all of them
hold at once. p-values are adjusted with Holm's step-down rule.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math

import numpy as np
from scipy import optimize
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8


@dataclasses.dataclass(frozen=True)
class Difference:
  """a minus b, on average, and what is known about it.

  low, high: the interval; p_value: two-sided, not adjusted; smallest_effect:
  the smallest true difference that this many seeds, with the spread seen,
  detect with a chance of 80 %. All None where there is no interval, and then
  note says why. n: pairs, or the smaller of two independent samples.
  """
  mean: float
  n: int
  low: float | None = None
  high: float | None = None
  p_value: float | None = None
  smallest_effect: float | None = None
  note: str = ""

  @property
  def direction(self) -> int:
    """-1 or 1 where the interval excludes zero on that side, else 0."""
    if self.low is None or self.low <= 0 <= self.high:
      return 0
    return 1 if self.low > 0 else -1


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], comparisons: int = 1,
) -> Difference:
  """The mean over seeds of a[seed] - b[seed], by Student's t distribution.

  Args:
    a, b: {seed: value}; both need the same seeds, and finite values.
    comparisons: how many comparisons share the 5 % chance of an error.
  """
  if set(a) != set(b):
    raise ValueError(
        f"the two sides have different seeds, {sorted(a)} and {sorted(b)}: "
        "compare the seeds that both have")
  seeds = sorted(a)
  if not seeds:
    raise ValueError("no seed to compare: finish one run on each side")
  for name, values in (("a", a), ("b", b)):
    if bad := [seed for seed in seeds if not math.isfinite(values[seed])]:
      raise ValueError(
          f"{name} is not finite for seeds {bad}: leave failed runs out")
  a_values = np.array([a[seed] for seed in seeds], np.float64)
  b_values = np.array([b[seed] for seed in seeds], np.float64)
  pairs = a_values - b_values
  mean, n = float(pairs.mean()), len(pairs)
  if n == 1:
    return Difference(mean, n, note=(
        "one seed: how much the difference varies between seeds is unknown, "
        "so there is no interval"))
  deviation = float(pairs.std(ddof=1))
  # Values of the order of a rounding error carry no information on the spread.
  scale = max(np.abs(a_values).max(), np.abs(b_values).max())
  if deviation <= 8 * np.finfo(np.float64).eps * scale:
    return Difference(mean, n, note=(
        f"the {n} differences are identical, so they are not {n} independent "
        "measurements and there is no interval"))
  error = deviation / math.sqrt(n)
  margin = critical_t(n - 1, comparisons) * error
  return Difference(
      mean, n, mean - margin, mean + margin,
      p_value=2 * float(stats.t.sf(abs(mean) / error, n - 1)),
      smallest_effect=smallest_effect(deviation, n, comparisons))


def independent_difference(
    a: Sequence[float], b: Sequence[float], comparisons: int = 1,
) -> Difference:
  """mean(a) - mean(b) of repeated measurements without pairs (Welch's t)."""
  for name, values in (("a", a), ("b", b)):
    if not len(values) or not np.isfinite(values).all():
      raise ValueError(
          f"{name}={list(values)} must be at least one finite measurement")
  mean, n = float(np.mean(a) - np.mean(b)), min(len(a), len(b))
  if n == 1:
    return Difference(mean, n, note="measured once, so there is no interval")
  if np.ptp(a) == 0 or np.ptp(b) == 0:
    return Difference(mean, n, note=(
        "the repeated measurements are identical, so there is no interval"))
  test = stats.ttest_ind(a, b, equal_var=False)
  interval = test.confidence_interval(1 - (1 - CONFIDENCE) / comparisons)
  return Difference(
      mean, n, float(interval.low), float(interval.high), float(test.pvalue))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
  """Mean and half-width of its own 95 % interval (None for one value)."""
  mean = float(np.mean(values))
  if len(values) < 2:
    return mean, None
  error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
  return mean, critical_t(len(values) - 1, 1) * error


def holm(p_values: Sequence[float]) -> list[float]:
  """Adjusted p-values: Holm's step-down method, in the order given."""
  adjusted, floor = [1.0] * len(p_values), 0.0
  for rank, index in enumerate(np.argsort(p_values, kind="stable")):
    floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
    adjusted[index] = floor
  return adjusted


@functools.lru_cache
def critical_t(degrees: int, comparisons: int) -> float:
  """Half-width of a simultaneous interval in standard errors."""
  return float(stats.t.isf((1 - CONFIDENCE) / (2 * comparisons), degrees))


def smallest_effect(deviation: float, n: int, comparisons: int = 1) -> float:
  """The true mean difference that n pairs detect with a chance of 80 %.

  deviation: standard deviation of the paired differences.
  """
  return deviation / math.sqrt(n) * _detectable(n - 1, comparisons)


@functools.lru_cache
def _detectable(degrees: int, comparisons: int) -> float:
  """The true effect, in standard errors, that is seen with the power wanted.

  The power is averaged over the estimated spread, because scipy's noncentral
  t distribution is nan in the tails that two seeds need.
  """
  ranks = (np.arange(20_000) + 0.5) / 20_000
  thresholds = critical_t(degrees, comparisons) * np.sqrt(
      stats.chi2.ppf(ranks, degrees) / degrees)
  def excess(effect):
    power = stats.norm.cdf(effect - thresholds) + stats.norm.cdf(
        -effect - thresholds)
    return power.mean() - POWER
  top = 2 * thresholds.max() + 10
  return float(optimize.brentq(excess, 0, top, xtol=1e-6))
