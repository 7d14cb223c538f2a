"""Fits loss = floor + gain * size^-exponent over arms, with an interval."""
from collections.abc import Mapping, Sequence
import dataclasses
import math

import numpy as np
from scipy import stats

from experiments.statistics import CONFIDENCE

# Below the first, a power law cannot be told from a logarithm, above the last
# from a single step.
EXPONENTS = np.geomspace(0.02, 8, 1200)


@dataclasses.dataclass(frozen=True)
class Trend:
  """A power law that some arms are held against.

  sizes: by arm, what the law is in (granularity, parameters, ...). label: its
  name. published: the exponent, and source where it stands.
  """
  label: str
  sizes: dict[str, float]
  published: float
  source: str

  def __post_init__(self):
    if len(set(self.sizes.values())) < 3 or min(self.sizes.values()) <= 0:
      raise ValueError(f"trend sizes={self.sizes}: a curve of three unknowns "
                       "needs three arms or more of different positive sizes")


@dataclasses.dataclass(frozen=True)
class Fit:
  """exponent: the best; low, high: its 95 % interval, None where the end is
  beyond all of EXPONENTS. gain: negative if larger sizes are worse."""
  exponent: float
  low: float | None
  high: float | None
  gain: float
  points: dict[str, float]  # by arm, the mean loss
  curve: tuple[tuple[float, float], ...]  # (size, loss)


def fit(trend: Trend, losses: Mapping[str, Mapping[int, float]],
        seeds: Sequence[int]) -> Fit | None:
  """The law by least squares, a seed's own level taken out of its losses.

  For each exponent the rest is linear; the interval holds those whose squares
  are not significantly more than the least (F test of one parameter, so lack
  of fit widens it).

  Args:
    losses: by arm and seed. Arms without one of the seeds are left out.

  Returns:
    None with fewer than two seeds or three sizes.
  """
  arms = [arm for arm in trend.sizes
          if arm in losses and all(seed in losses[arm] for seed in seeds)]
  size_A = np.array([trend.sizes[arm] for arm in arms], np.float64)
  if len(seeds) < 2 or len(set(size_A)) < 3:
    return None
  loss_SA = np.array([[losses[arm][seed] for arm in arms] for seed in seeds])
  within_SA = loss_SA - loss_SA.mean(1, keepdims=True)
  # One level a seed, a gain and the exponent.
  degrees = within_SA.size - len(seeds) - 2
  basis_XA = size_A ** -EXPONENTS[:, None]
  basis_XA -= basis_XA.mean(1, keepdims=True)
  gain_X = (basis_XA * within_SA.mean(0)).sum(1) / (basis_XA ** 2).sum(1)
  rest_XSA = within_SA - (gain_X[:, None] * basis_XA)[:, None]
  squares_X = (rest_XSA ** 2).sum((1, 2))
  best = int(squares_X.argmin())
  allowed = squares_X[best] * (
      1 + stats.f.ppf(CONFIDENCE, 1, degrees) / degrees)
  inside = np.flatnonzero(squares_X <= allowed)
  # The ends lie between grid points: the wider ones are taken.
  low = max(inside[0] - 1, 0)
  high = min(inside[-1] + 1, len(EXPONENTS) - 1)
  exponent, gain = float(EXPONENTS[best]), float(gain_X[best])
  floor = float(loss_SA.mean() - gain * np.mean(size_A ** -exponent))
  sizes = np.geomspace(size_A.min(), size_A.max(), 50).tolist()
  return Fit(
      exponent,
      None if low == 0 else float(EXPONENTS[low]),
      None if high == len(EXPONENTS) - 1 else float(EXPONENTS[high]),
      gain, dict(zip(arms, loss_SA.mean(0).tolist())),
      tuple((x, floor + gain * x ** -exponent) for x in sizes))


def describe(trend: Trend, found: Fit | None) -> str:
  """What the fit says of the published exponent, in one or two sentences."""
  if found is None:
    return (f"No exponent of {trend.label} could be fitted: it needs two seeds "
            "and three sizes.")
  if found.gain < 0:
    return (f"The loss rises with {trend.label}, so there is no exponent to "
            f"compare with the published {trend.published:g} ({trend.source}).")
  low, high = found.low or 0.0, found.high or math.inf
  ends = (f"at least {found.low:.2g}" if found.low and not found.high else
          f"at most {found.high:.2g}" if found.high and not found.low else
          f"{found.low:.2g} to {found.high:.2g}" if found.low else
          "anything at all")
  if low == 0 and high == math.inf:
    return (f"The losses do not determine the exponent of {trend.label} "
            f"(published: {trend.published:g}, {trend.source}).")
  lies = (f"the published {trend.published:g} ({trend.source}) lies "
          f"{'inside' if low <= trend.published <= high else 'outside'}.")
  if found.exponent == EXPONENTS[-1]:
    return (f"Past the first step of {trend.label} the loss falls no further, so "
            f"any exponent from {low:.2g} on fits (95 %); {lies}")
  return (f"Fitted exponent of {trend.label}: {found.exponent:.2g}, 95 % "
          f"interval {ends}; {lies}")
