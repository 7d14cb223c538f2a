"""The fit of a power law: what it was made from comes back."""
import numpy as np
import pytest

from experiments import scaling

SIZES = {"a": 1, "b": 2, "c": 4, "d": 8, "e": 16}
TREND = scaling.Trend("granularity", SIZES, 0.58, "somebody")


def losses(exponent, gain=0.5, noise=0.0, seeds=(3, 5, 8)):
  rng = np.random.default_rng(0)
  # Seeds differ in level much more than the law changes.
  level = {seed: rng.normal(2, 0.3) for seed in seeds}
  return {arm: {seed: level[seed] + gain * size ** -exponent
                + noise * rng.normal() for seed in seeds}
          for arm, size in SIZES.items()}, seeds


@pytest.mark.parametrize("exponent", [0.2, 0.58, 1.7])
def test_the_exponent_comes_back(exponent):
  found = scaling.fit(TREND, *losses(exponent, noise=1e-4))
  assert found.exponent == pytest.approx(exponent, rel=0.02)
  assert found.low < exponent < found.high < 1.1 * exponent
  assert found.gain == pytest.approx(0.5, rel=0.02)
  # The curve goes through the points.
  assert dict(found.curve)[1.0] == pytest.approx(found.points["a"], abs=1e-3)


def test_the_interval_covers_as_often_as_it_says():
  rng, inside, trials = np.random.default_rng(1), 0, 200
  for _ in range(trials):
    values = {arm: {seed: 0.3 * size ** -0.58 + 0.01 * rng.normal()
                    for seed in range(5)} for arm, size in SIZES.items()}
    found = scaling.fit(TREND, values, range(5))
    inside += (found.low or 0) <= 0.58 <= (found.high or np.inf)
  # 95 % of 200 is 190; four standard deviations are 12.
  assert 178 <= inside <= 200


def test_words_follow_the_interval():
  sure = scaling.describe(TREND, scaling.fit(TREND, *losses(0.58, noise=1e-3)))
  assert "lies inside" in sure and "0.58 (somebody)" in sure
  off = scaling.describe(TREND, scaling.fit(TREND, *losses(1.7, noise=1e-3)))
  assert "lies outside" in off
  step = scaling.describe(TREND, scaling.fit(TREND, *losses(30, noise=1e-3)))
  assert step.startswith("Past the first step of granularity")
  assert "lies outside" in step
  worse = scaling.describe(TREND, scaling.fit(
      TREND, *losses(0.58, gain=-0.5, noise=1e-3)))
  assert "rises with granularity" in worse
  vague = scaling.describe(TREND, scaling.fit(
      TREND, *losses(0.58, gain=1e-6, noise=0.1)))
  assert "do not determine" in vague or "rises" in vague


def test_too_little_is_not_fitted():
  values, seeds = losses(0.58)
  assert scaling.fit(TREND, values, seeds[:1]) is None
  assert scaling.fit(TREND, {arm: values[arm] for arm in "ab"}, seeds) is None
  assert "could be fitted" in scaling.describe(TREND, None)
  with pytest.raises(ValueError, match="three arms or more"):
    scaling.Trend("granularity", {"a": 1, "b": 2}, 0.58, "somebody")
