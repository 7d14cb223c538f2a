import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import stats

from experiments import statistics

VALUES = st.floats(-10, 10).map(lambda value: round(value, 3))
PAIRS = st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=9)


def seeds(values):
  return {seed + 5: value for seed, value in enumerate(values)}


def t_two_degrees(p):
  """Quantile of t with two degrees of freedom, in closed form."""
  return (2 * p - 1) / math.sqrt(2 * p * (1 - p))


@pytest.mark.parametrize("comparisons", [1, 5])
def test_paired_difference_worked_by_hand(comparisons):
  # The differences are 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3).
  found = statistics.paired_difference(
      seeds([5, 8, 4]), seeds([4, 6, 1]), comparisons)
  half = t_two_degrees(1 - 0.025 / comparisons) / math.sqrt(3)
  assert found.mean == 2 and found.n == 3 and not found.note
  assert found.low == pytest.approx(2 - half)
  assert found.high == pytest.approx(2 + half)
  t = 2 * math.sqrt(3)
  assert found.p_value == pytest.approx(1 - t / math.sqrt(t ** 2 + 2))


@settings(deadline=None)
@given(PAIRS, st.integers(1, 20))
def test_paired_difference_is_scipys(pairs, comparisons):
  a, b = zip(*pairs)
  found = statistics.paired_difference(seeds(a), seeds(b), comparisons)
  if np.ptp(np.subtract(a, b)) < 1e-6:
    assert found.low is None
    return
  expected = stats.ttest_rel(a, b)
  interval = expected.confidence_interval(1 - 0.05 / comparisons)
  assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
  assert (found.low, found.high) == pytest.approx(tuple(interval), rel=1e-6)


@settings(deadline=None)
@given(PAIRS)
def test_paired_difference_turns_round_and_ignores_order(pairs):
  a, b = map(seeds, zip(*pairs))
  found = statistics.paired_difference(a, b)
  turned = statistics.paired_difference(dict(reversed(b.items())), a)
  assert turned.mean == pytest.approx(-found.mean)
  assert turned.p_value == found.p_value
  assert turned.direction == -found.direction
  if found.low is not None:
    assert (turned.low, turned.high) == pytest.approx(
        (-found.high, -found.low))


def test_one_seed_has_no_interval():
  found = statistics.paired_difference({3: 1.5}, {3: 1.25})
  assert found.mean == 0.25
  assert (found.low, found.high, found.p_value, found.smallest_effect) == (
      None,) * 4
  assert "one seed" in found.note and found.direction == 0


@pytest.mark.parametrize("a", [(0.1, 0.2, 0.3), (7.0, 7.0, 7.0)])
def test_identical_differences_have_no_interval(a):
  # In binary 0.1 + 0.2 - 0.1 is not 0.2: rounding must not pass for spread.
  found = statistics.paired_difference(
      seeds(a), seeds([value + 0.2 for value in a]))
  assert found.mean == pytest.approx(-0.2)
  assert found.low is None and "identical" in found.note


@pytest.mark.parametrize("a, b, message", [
    ({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0}, r"\[0, 1\] and \[0, 2\]"),
    ({0: 1.0, 4: math.nan}, {0: 1.0, 4: 2.0}, r"a is not finite .*\[4\]"),
    ({0: 1.0, 4: 1.0}, {0: math.inf, 4: 2.0}, r"b is not finite .*\[0\]"),
    ({}, {}, "no seed"),
])
def test_bad_pairs_are_refused(a, b, message):
  with pytest.raises(ValueError, match=message):
    statistics.paired_difference(a, b)


def test_independent_difference_worked_by_hand():
  # Squared errors 1/3 and 5/3, so 2 in all; degrees by Welch and Satterthwaite.
  found = statistics.independent_difference([1, 2, 3], [2, 4, 6, 8], 3)
  degrees = 4 / ((1 / 3) ** 2 / 2 + (5 / 3) ** 2 / 3)
  half = stats.t.ppf(1 - 0.025 / 3, degrees) * math.sqrt(2)
  assert found.mean == -3 and found.n == 3
  assert (found.low, found.high) == pytest.approx((-3 - half, -3 + half))
  assert found.p_value == pytest.approx(
      2 * stats.t.sf(3 / math.sqrt(2), degrees))


@pytest.mark.parametrize("a, b, note", [
    ([1.0], [2.0, 2.5], "once"), ([1.0, 1.0], [2.0, 2.5], "identical")])
def test_independent_difference_without_spread(a, b, note):
  found = statistics.independent_difference(a, b)
  assert found.low is None and note in found.note


@pytest.mark.parametrize("bad", [[], [1.0, math.nan]])
def test_independent_difference_refuses(bad):
  with pytest.raises(ValueError, match="b=.* finite measurement"):
    statistics.independent_difference([1.0, 2.0], bad)


def test_holm_worked_by_hand():
  # Sorted .005 .01 .03 .04, times 4 3 2 1, never falling.
  assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
      [0.03, 0.06, 0.06, 0.02])
  assert statistics.holm([0.9, 0.7]) == [1.0, 1.0]
  assert statistics.holm([]) == []


def test_mean_interval():
  mean, half = statistics.mean_interval([1.0, 2.0, 3.0])
  assert mean == 2
  assert half == pytest.approx(t_two_degrees(0.975) / math.sqrt(3))
  assert statistics.mean_interval([4.0]) == (4.0, None)


@pytest.mark.parametrize("n, arms", [(2, 1), (3, 4), (6, 4)])
def test_intervals_hold_together_as_often_as_they_say(n, arms):
  """Arms that share seeds and a baseline, whose true effects are known."""
  rng = np.random.default_rng(11)
  trials = 1200
  effects = np.linspace(-0.3, 0.5, arms)
  held = 0
  for _ in range(trials):
    common = rng.normal(size=n)
    base = seeds(common + 0.2 * rng.normal(size=n))
    found = [
        statistics.paired_difference(
            seeds(effect + common + 0.2 * rng.normal(size=n)), base, arms)
        for effect in effects]
    held += all(
        f.low <= effect <= f.high for f, effect in zip(found, effects))
  # Four standard errors; Bonferroni is exact for one and careful for several.
  slack = 4 * math.sqrt(0.95 * 0.05 / trials)
  assert held / trials > 0.95 - slack
  assert held / trials < (0.95 + slack if arms == 1 else 0.99)


@pytest.mark.parametrize("n, comparisons", [(2, 1), (3, 8), (5, 3)])
def test_smallest_effect_is_seen_four_times_in_five(n, comparisons):
  rng = np.random.default_rng(12)
  trials, deviation = 20_000, 0.7
  effect = statistics.smallest_effect(deviation, n, comparisons)
  pairs = rng.normal(effect, deviation, size=(trials, n))
  p_values = stats.ttest_1samp(pairs, 0, axis=1).pvalue
  power = (p_values < 0.05 / comparisons).mean()
  assert power == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / trials))


def test_smallest_effect_of_many_seeds_is_the_normal_one():
  expected = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
  assert 100 * statistics.smallest_effect(1.0, 10_000) == pytest.approx(
      expected, rel=1e-3)
