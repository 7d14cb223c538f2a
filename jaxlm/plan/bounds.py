"""How long a step takes at least: arithmetic with public figures."""
import dataclasses
import itertools
import math

from jaxlm.parallel.mesh import AXES
from jaxlm.plan.devices import Slice


@dataclasses.dataclass(frozen=True)
class Bounds:
  """Seconds of a step, of each resource alone; `wire` by axes of the mesh.

  overlapped: if all run at once, the busiest of them. alone: if nothing is
  sent while anything is computed. mfu_*: useful FLOPs over peak in that time.
  """
  compute: float
  memory: float
  wire: dict[str, float]
  overlapped: float
  alone: float
  mfu_overlapped: float
  mfu_alone: float


def bounds(slice_: Slice, mesh_shape: dict[str, int], useful: float,
           executed: float, traffic: float,
           wire: dict[tuple[str, str], float]) -> Bounds:
  """Args:
    useful, executed: FLOPs of one device. traffic: bytes that it reads and
    writes in HBM at least. wire: bytes it receives, by axes ("data+expert")
    and kind.
  """
  device, rates = slice_.device, axis_bandwidths(slice_, mesh_shape)
  sides = torus_dimensions(slice_, mesh_shape) if device.torus else None
  compute, memory = executed / device.flops, traffic / device.bandwidth
  seconds, busy = {}, {}
  for (axes, kind), nbytes in wire.items():
    names = axes.split("+")
    # On a torus all axes' links carry a part of what goes along several.
    rate = (sum if device.torus else min)(rates[name] for name in names)
    if sides and "all-to-all" in kind:
      # What goes to every device passes s / 4 of a ring's s links, of a line's
      # twice as many.
      side = max(side for name in names for side in sides[name])
      rate = min(rate, 4 * slice_.dimension_bandwidth(side) / side)
    seconds[axes] = seconds.get(axes, 0.0) + nbytes / rate
    for name in names:
      busy[name] = busy.get(name, 0.0) + nbytes / rate
  own = max(compute, memory)
  overlapped = max(own, *busy.values(), 0.0)
  alone = own + sum(seconds.values())
  ideal = useful / device.flops
  return Bounds(compute, memory, seconds, overlapped, alone,
                ideal / overlapped, ideal / alone)


def axis_bandwidths(slice_: Slice,
                    mesh_shape: dict[str, int]) -> dict[str, float]:
  """Bytes a second that reach a device along each axis of the mesh."""
  device, rates, inner = slice_.device, {}, 1
  if not device.torus:
    for axis in reversed(AXES):
      inner *= mesh_shape[axis]
      rates[axis] = device.link if inner <= device.domain else device.network
    return rates
  for axis, dims in torus_dimensions(slice_, mesh_shape).items():
    rates[axis] = sum(map(slice_.dimension_bandwidth, dims))
  return rates


def torus_dimensions(slice_: Slice, mesh_shape: dict[str, int]
                     ) -> dict[str, tuple[int, ...]]:
  """Sizes of the dimensions of the torus that each axis of the mesh takes: as
  `jax.make_mesh` lays them, those that take whole dimensions first; what is
  left is shared, a part of one dimension each."""
  left, found = list(slice_.shape), {}
  axes = sorted((axis for axis in AXES if mesh_shape[axis] > 1),
                key=lambda axis: -mesh_shape[axis])
  for axis in axes:
    for count in range(1, len(left) + 1):
      whole = next((dims for dims in itertools.combinations(left, count)
                    if math.prod(dims) == mesh_shape[axis]), None)
      if whole:
        found[axis] = whole
        for size in whole:
          left.remove(size)
        break
  for axis in AXES:
    if axis not in found:
      found[axis] = (min(mesh_shape[axis], max(slice_.shape)),)
  return found


def aligned(slice_: Slice, mesh_shape: dict[str, int]) -> bool:
  """Whether each axis takes whole dimensions of the torus."""
  if not slice_.device.torus:
    return True
  dims = torus_dimensions(slice_, mesh_shape)
  return all(math.prod(dims[axis]) == size and all(
      d in slice_.shape for d in dims[axis])
      for axis, size in mesh_shape.items() if size > 1)
