"""FLOPs of matmuls of a traced program, loops as often as they go round.

XLA's own count takes the body of a loop once, whatever its length.
"""
import dataclasses
import math

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

# The scope of what runs only where experts are far from balanced.
RARELY = "rarely"


@dataclasses.dataclass
class FlopCount:
  """FLOPs of one device: of XLA's matmuls and of kernels, by their names.

  unknown: what could not be counted, or only once.
  """
  matmuls: float = 0.0
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)
  unknown: set[str] = dataclasses.field(default_factory=set)

  @property
  def total(self) -> float:
    return self.matmuls + sum(self.kernels.values())

  def add(self, other: "FlopCount", times: float = 1.0):
    self.matmuls += times * other.matmuls
    for name, flops in other.kernels.items():
      self.kernels[name] = self.kernels.get(name, 0.0) + times * flops
    self.unknown |= other.unknown


def count(closed: ClosedJaxpr, num_devices: int = 1, platform: str = "tpu",
          expert_rows: float | None = None) -> FlopCount:
  """FLOPs of each of `num_devices` devices, for a program traced for all.

  What is outside `shard_map` counts as split evenly; inside, each device does
  what its program says. Of branches chosen by platform that of `platform`
  counts, of others the dearest. A loop of unknown length counts once, or not
  at all in a scope named "rarely". Pallas kernels count as their
  `cost_estimate` says, or without one as their body for each step of the grid;
  those of experts skip the rows of a buffer that are nobody's.

  Args:
    expert_rows: rows that a device's experts have, in buffers of at least so
      many; None counts whole buffers.
  """
  jaxpr = partial_eval.dce_jaxpr(
      closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)[0]
  return _jaxpr(jaxpr, 1 / num_devices, (platform, expert_rows))


def _jaxpr(jaxpr: Jaxpr, scale: float, options) -> FlopCount:
  total = FlopCount()
  for eqn in jaxpr.eqns:
    total.add(_equation(eqn, scale, options))
  return total


def _equation(eqn, scale, options) -> FlopCount:
  name, params = eqn.primitive.name, eqn.params
  platform, expert_rows = options
  inner = lambda jaxpr, scale=scale: _jaxpr(_open(jaxpr), scale, options)
  total = FlopCount()
  match name:
    case "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      total.matmuls = scale * 2 * _size(eqn.outvars[0]) * _sizes(
          eqn.invars[0], contracted)
    case "ragged_dot_general" | "ragged_dot":
      total.matmuls = scale * _ragged(eqn)
    case "conv_general_dilated":
      total.matmuls = scale * _convolution(eqn)
    case "scan":
      total.add(inner(params["jaxpr"]), params["length"])
    case "while" if RARELY in str(eqn.source_info.name_stack):
      pass
    case "while":
      total = inner(params["body_jaxpr"])
      if total.total:
        total.unknown.add("a loop whose length depends on data, counted once")
    case "cond":
      total = _branch(eqn, inner, platform)
    case "shard_map":
      sizes = params["mesh"].shape
      axes = params.get("newly_manual_axes", params.get("manual_axes"))
      total = inner(params["jaxpr"],
                    scale * math.prod(sizes[axis] for axis in axes))
    case "pallas_call":
      _kernel(eqn, scale * _used(eqn, expert_rows), inner, total)
    case _ if name.startswith("custom_vjp"):
      # Not differentiated: the function, not its rules.
      total = inner(params.get("call_jaxpr") or params["fun_jaxpr"])
    case _:
      for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
          if isinstance(item, (ClosedJaxpr, Jaxpr)):
            total.add(inner(item))
  return total


def _open(jaxpr) -> Jaxpr:
  return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _size(variable) -> int:
  return math.prod(variable.aval.shape)


def _sizes(variable, axes) -> int:
  return math.prod(variable.aval.shape[axis] for axis in axes)


def _ragged(eqn) -> float:
  """A row meets one group's matrix, whichever axis the groups are on."""
  dims = eqn.params["ragged_dot_dimension_numbers"]
  (contracted, _), _ = dims.dot_dimension_numbers
  lhs = eqn.invars[0]
  flops = 2 * _size(eqn.outvars[0]) * _sizes(lhs, contracted)
  if set(dims.lhs_ragged_dimensions) & set(contracted):
    flops //= eqn.outvars[0].aval.shape[0]
  return flops


def _convolution(eqn) -> float:
  _, inputs, *window = eqn.params["dimension_numbers"].rhs_spec
  return 2 * _size(eqn.outvars[0]) * _sizes(eqn.invars[1], (inputs, *window))


def _branch(eqn, inner, platform) -> FlopCount:
  branches = eqn.params["branches"]
  chosen = eqn.params.get("branches_platforms")
  if chosen is not None:
    index = next(i for i, names in enumerate(chosen)
                 if names is None or platform in names)
    return inner(branches[index])
  return max(map(inner, branches), key=lambda count: count.total)


def _used(eqn, expert_rows) -> float:
  if expert_rows is None or not eqn.params["name"].startswith("expert_"):
    return 1.0
  rows = max(v.aval.shape[0] for v in (*eqn.invars, *eqn.outvars)
             if v.aval.ndim == 2)
  return min(1.0, expert_rows / rows)


def _kernel(eqn, scale, inner, total: FlopCount):
  name, estimate = eqn.params["name"], eqn.params["cost_estimate"]
  if estimate is not None:
    total.kernels[name] = scale * estimate.flops
    return
  grid = [n for n in eqn.params["grid_mapping"].grid if isinstance(n, int)]
  body = inner(eqn.params["jaxpr"])
  total.kernels[name] = body.total * math.prod(grid)
  if len(grid) < len(eqn.params["grid_mapping"].grid):
    total.unknown.add(f"kernel {name}: a grid whose size depends on data")
