"""Solves for the dimensions at which arms of an ablation cost the same.

An arm is a function of its free dimensions, `make(d_model=..., ...) ->
ModelConfig`, and the values that each may take. `solve` finds values at which
the model has the targeted parameters and FLOPs; `held` says what was so held
equal, and what was not:

  arms = {"wide": dict(make=wide, free={"d_model": range(48, 96), ...}),
          "deep": dict(make=deep, free={"d_model": range(24, 48), ...})}
  near = {"total_params": 4e5, "active_params": 1e5}
  targets = common_targets(arms, near, slack=0.05, seq_len=256)
  solutions = solve_arms(arms, targets=targets, seq_len=256)
  held_equal, not_held = held(solutions)

The search is exhaustive: it halves boxes of free values and drops those whose
smallest model is too large, or whose largest is too small. That is right if
every free dimension makes every targeted quantity grow.
"""
import dataclasses
import functools
import math
from typing import Callable, Collection

import numpy as np

from experiments.results import Held
from jaxlm.config import ModelConfig
from jaxlm.model import costs

QUANTITIES = {
    "total_params": lambda config, seq_len:
        costs.parameter_counts(config).total,
    "active_params": lambda config, seq_len:
        costs.parameter_counts(config).active,
    "flops_per_token": lambda config, seq_len:
        costs.flops_per_token(config, seq_len).total,
    "attention_params": lambda config, seq_len:
        costs.parameter_counts(config).attention,
    "kv_bytes_per_token": lambda config, seq_len:
        costs.kv_bytes_per_token(config, seq_len),
}
TOLERANCE = 0.005


@dataclasses.dataclass(frozen=True)
class Solution:
  """An arm with its dimensions found.

  dims: of the free dimensions. achieved: all of QUANTITIES. deviations: of
  what was targeted, (achieved - target) / target.
  """
  config: ModelConfig
  dims: dict[str, int]
  targets: dict[str, float]
  achieved: dict[str, float]
  deviations: dict[str, float]


def measure(config: ModelConfig, seq_len: int, *names: str) -> dict:
  """The QUANTITIES of a model, all or those named."""
  return {name: QUANTITIES[name](config, seq_len)
          for name in names or QUANTITIES}


def apart(a: float, b: float) -> float:
  """How far a is from b, as a ratio: |log(a / b)|. For `prefer`."""
  return abs(math.log(a / b))


def _indifferent(config: ModelConfig) -> float:
  return 0.0


def solve(make: Callable[..., ModelConfig], free: dict[str, Collection[int]],
          targets: dict[str, float], seq_len: int, *,
          prefer: Callable[[ModelConfig], float] = _indifferent,
          tolerance: float = TOLERANCE) -> Solution:
  """The model nearest the preferred shape that meets all targets.

  Each target is met within half the tolerance, so that any two arms of the
  same targets agree within all of it. Of the models that do, those within 0.1
  of the least `prefer` compete; multiples of 8 win over multiples of 4 over
  others, then the smallest of the largest deviations wins.

  Args:
    free: the values that each argument of `make` may take; every combination
      makes a model, and greater values make no smaller one. For large models
      steps of 8 keep the search short.
    targets: values of some of QUANTITIES.
    seq_len: at which FLOPs are counted.
    prefer: how far a model is from the shape one would choose, for instance
      `apart(config.mlp.d_ff, 4 * config.d_model)`.

  Raises:
    ValueError: no combination meets the targets; names the nearest.
  """
  search = _Search(make, free, targets, seq_len, tolerance)
  found = [search.model(index) for index in search.within(tolerance / 2)]
  if not found:
    raise ValueError(search.explain(
        tolerance / 2, f"raise tolerance={tolerance:g}, move the targets "
        "(common_targets)"))
  distances = [prefer(solution.config) for solution in found]
  near = [solution for solution, distance in zip(found, distances)
          if distance <= min(distances) + 0.1]
  best = min(near, key=lambda solution: (
      sum(_unfriendly(size) for size in solution.dims.values()),
      _worst(solution), tuple(solution.dims.values())))
  return dataclasses.replace(best, achieved=measure(best.config, seq_len))


def fixed(config: ModelConfig, seq_len: int) -> Solution:
  """A model of given dimensions, for arms that share it: what parameters it
  has are its targets."""
  achieved = measure(config, seq_len)
  targets = {name: achieved[name] for name in ("total_params", "active_params")}
  return Solution(config, {}, targets, achieved, dict.fromkeys(targets, 0.0))


def solve_arms(arms: dict[str, dict], **common) -> dict[str, Solution]:
  """`solve` for each arm, with its arguments and those common to all."""
  solutions = {}
  for name, arguments in arms.items():
    try:
      solutions[name] = solve(**{**common, **arguments})
    except ValueError as error:
      raise ValueError(f"arm {name!r}: {error}") from error
  return solutions


def common_targets(arms: dict[str, dict], targets: dict[str, float],
                   slack: float, **common) -> dict[str, float]:
  """Targets near those given that all arms can meet in good shape.

  The dimensions of small models are coarse: the nearest common size is often
  a few percent away. Tried are the sizes of the arm with the fewest models
  within `slack` of the targets; the one is taken at which the arms' models
  come nearest to what they `prefer`, by the arm that comes off worst.

  Args:
    arms, common: as in `solve_arms`, without targets.
    slack: how far each target may move; 0.05 is 5 %.
  """
  tolerance, sizes, regrets = common.pop("tolerance", TOLERANCE), {}, {}
  for name, arguments in arms.items():
    arguments = {**common, **arguments}
    prefer = arguments.pop("prefer", _indifferent)
    search = _Search(**arguments, targets=targets, tolerance=tolerance)
    found = [search.model(index) for index in search.within(slack)]
    if not found:
      raise ValueError(
          f"arm {name!r}: {search.explain(slack, f'raise slack={slack:g}')}")
    sizes[name] = np.array([[*model.achieved.values()] for model in found])
    distances = np.array([prefer(model.config) for model in found])
    regrets[name] = distances - distances.min()
  fewest = min(sizes, key=lambda name: len(sizes[name]))
  worst = np.zeros(len(sizes[fewest]))
  for name in arms:
    for i, size in enumerate(sizes[fewest]):
      fits = np.all(abs(sizes[name] / size - 1) <= tolerance / 2, axis=1)
      worst[i] = max(worst[i], min(regrets[name][fits], default=np.inf))
  if np.isinf(worst.min()):
    raise ValueError(
        f"no targets within {slack:.1%} of {_show(targets)} suit all arms: "
        f"arm {fewest!r} has {len(worst)} models there, none of a size that "
        "every other arm can have; raise slack, allow more values or free "
        "another dimension")
  best = sizes[fewest][np.argmin(worst)]
  return dict(zip(targets, map(float, best)))


def held(solutions: dict[str, Solution], tolerance: float = TOLERANCE,
         notes: dict[str, str] | None = None
         ) -> tuple[tuple[Held, ...], tuple[Held, ...]]:
  """What was held equal, and what was not.

  Arms with the same targets are compared with each other: what was targeted
  with its target, the other QUANTITIES with the first such arm's. `notes`
  gives reasons by quantity.
  """
  equal, unequal = [], []
  for quantity in QUANTITIES:
    groups = {}
    for name, solution in solutions.items():
      target = solution.targets.get(quantity)
      key = (tuple(solution.targets.items()) if target is None else target)
      groups.setdefault(key, []).append(name)
    for names in groups.values():
      first = solutions[names[0]]
      targeted = quantity in first.targets
      target = (first.targets if targeted else first.achieved)[quantity]
      values = [solutions[name].achieved[quantity] for name in names]
      deviation = max(abs(value / target - 1) for value in values)
      agree = targeted or deviation <= tolerance
      note = (notes or {}).get(quantity, "")
      if not targeted and not note and len(names) > 1:
        note = (f"not a target: {min(values):,.0f} to {max(values):,.0f}, "
                f"compared with {names[0]}")
      if targeted or len(names) > 1:
        (equal if agree else unequal).append(Held(
            quantity, target, deviation, note,
            () if len(names) == len(solutions) else tuple(names)))
  return tuple(equal), tuple(unequal)


class _Search:
  """The grid of an arm's free values; an index has a place on each axis."""

  def __init__(self, make, free, targets, seq_len, tolerance):
    self.make, self.targets, self.seq_len = make, targets, seq_len
    self.free = {name: sorted(set(values)) for name, values in free.items()}
    _validate(self.free, targets, tolerance)
    self.last = tuple(len(values) - 1 for values in self.free.values())
    self.model = functools.cache(self._model)

  def _model(self, index) -> Solution:
    dims = {name: values[i]
            for i, (name, values) in zip(index, self.free.items())}
    try:
      config = self.make(**dims)
    except ValueError as error:
      raise ValueError(f"free values {dims} make no model: {error}") from error
    achieved = measure(config, self.seq_len, *self.targets)
    return Solution(
        config, dims, self.targets, achieved,
        {name: achieved[name] / target - 1
         for name, target in self.targets.items()})

  def within(self, limit: float):
    """Indices of the models whose deviations are all within the limit."""
    boxes = [((0,) * len(self.last), self.last)]
    while boxes:
      low, high = boxes.pop()
      smallest, largest = self.model(low), self.model(high)
      self._check_growth(smallest, largest)
      if (max(smallest.deviations.values()) > limit
          or min(largest.deviations.values()) < -limit):
        continue
      if low == high:
        yield low
        continue
      spread = [b / a for a, b in zip(smallest.dims.values(),
                                      largest.dims.values())]
      axis = spread.index(max(spread))
      middle = (low[axis] + high[axis]) // 2
      for start, stop in ((low[axis], middle), (middle + 1, high[axis])):
        boxes.append((low[:axis] + (start,) + low[axis + 1:],
                      high[:axis] + (stop,) + high[axis + 1:]))

  def _check_growth(self, smallest, largest):
    for name in self.targets:
      if smallest.achieved[name] > largest.achieved[name]:
        raise ValueError(
            f"{name} falls from {smallest.dims} to {largest.dims}: name free "
            "dimensions such that greater values make greater models")

  def explain(self, limit: float, remedy: str) -> str:
    """Why nothing is within the limit, what is nearest, and what to change."""
    smallest, largest = self.model((0,) * len(self.last)), self.model(self.last)
    for name, target in self.targets.items():
      too_large = smallest.deviations[name] > limit
      if too_large or largest.deviations[name] < -limit:
        return (f"{name}={target:,.0f} is out of reach: the free values give "
                f"{smallest.achieved[name]:,.0f} to "
                f"{largest.achieved[name]:,.0f}; allow "
                f"{'lower' if too_large else 'greater'} values of "
                f"{' or '.join(self.free)}")
    near, wider = [], limit
    while not near:
      wider *= 2
      near = [self.model(index) for index in self.within(wider)]
    nearest = min(near, key=lambda model: (
        _worst(model), tuple(model.dims.values())))
    ends = [f"{name} {side} {value}" for name, value in nearest.dims.items()
            for side, end in (("below", 0), ("above", -1))
            if value == self.free[name][end]]
    allow = (" or ".join(ends) if ends
             else "values between those given, free another dimension")
    return (f"no model has {_show(self.targets)} within {limit:.2%}; the "
            f"nearest is {nearest.dims} with {_show(nearest.achieved)}, off "
            f"by {_worst(nearest):.2%}: allow {allow}, or {remedy}")


def _validate(free, targets, tolerance):
  if not targets or set(targets) - set(QUANTITIES):
    raise ValueError(f"targets={targets}: name some of {tuple(QUANTITIES)}")
  for name, target in targets.items():
    if not target > 0:
      raise ValueError(f"targets[{name!r}]={target}: must be positive")
  for name, values in free.items():
    if not values or values[0] < 1:
      raise ValueError(f"free[{name!r}]={values}: give positive integers")
  if not free:
    raise ValueError("free is empty: name the dimensions to solve for")
  if not tolerance > 0:
    raise ValueError(f"tolerance={tolerance}: must be positive")


def _unfriendly(size: int) -> int:
  return 0 if size % 8 == 0 else 1 if size % 4 == 0 else 2


def _worst(solution: Solution) -> float:
  return max(map(abs, solution.deviations.values()))


def _show(quantities: dict) -> str:
  return ", ".join(f"{name}={value:,.0f}" for name, value in quantities.items())
