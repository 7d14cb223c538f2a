"""The mesh of devices, and which of its axes split which axes of an array.

The model runs under `jax.set_mesh(make_mesh(...))` as it does without. Its
axes are automatic (XLA's partitioner splits what no one splits by hand), but
attention, experts and loss are programs of one device each (`manual`), which
exchange what they say they exchange.
"""
import functools
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

# From the slowest links to the fastest: `tensor` neighbours are next to each
# other. stage: of a pipeline, each with a part of the layers. data: parts of
# the batch. context: parts of each sequence. expert: parts of the experts, and
# of the batch too. tensor: parts of heads, of feed-forwards and vocabulary.
AXES = ("stage", "data", "context", "expert", "tensor")

# Logical axis of an array: the axes of the mesh that it is split over.
RULES = {
    # of activations
    "batch": ("data", "expert"),
    "length": ("context",),
    # of weights; those over which the batch is split too are gathered as a
    # weight is used (fully sharded data parallelism), the others never
    "embed": ("data", "context", "expert"),
    "expert_embed": ("data", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "whole_expert": ("expert", "tensor"),  # of quantized leaves
    "layers": ("stage",),
    **dict.fromkeys(("head_dim", "latent", "norm", "positions", "router")),
}
# Where weights stay as they are used, as in decoding, which reads each weight
# once for few tokens: gathering would cost more than all else.
RESIDENT = {**RULES, "embed": None, "expert_embed": None,
            "vocab": ("tensor", "expert")}


def rules(fsdp: bool = True) -> dict[str, tuple[str, ...] | None]:
  return RULES if fsdp else RESIDENT


def parse_mesh(text: str) -> dict[str, int]:
  """"data=8,expert=4" as sizes.

  Raises:
    ValueError: an unknown axis, one given twice, or no positive number.
  """
  sizes = {}
  for part in filter(None, text.split(",")):
    name, _, size = part.partition("=")
    name, size = name.strip(), size.strip()
    if name in sizes or not size.isdecimal() or not int(size):
      raise ValueError(f"mesh {text!r}: {part!r} is not NAME=SIZE of an axis "
                       f"not yet named; write {_example()}")
    sizes[name] = int(size)
  _known(sizes)
  return sizes


def _example():
  return "data=2,expert=4"


def _known(names: Iterable[str]):
  unknown = [name for name in names if name not in AXES]
  if unknown:
    raise ValueError(f"mesh axis {unknown[0]!r}: use some of {AXES}")


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None) -> Mesh:
  """A mesh with all of `AXES`, those not named of size 1.

  Args:
    sizes: their product is the number of devices; by default all of them are
      `data`.
    devices: all by default; of a `jax.experimental.topologies` too.

  Raises:
    ValueError: unknown axes, or sizes that do not make up the devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": len(devices)} if sizes is None else dict(sizes)
  _known(sizes)
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"mesh {name}={size}: must be at least 1")
  if math.prod(sizes.values()) != len(devices):
    given = " x ".join(f"{name}={size}" for name, size in sizes.items())
    raise ValueError(f"mesh {given} is {math.prod(sizes.values())} devices, "
                     f"but there are {len(devices)}: choose sizes whose "
                     "product is that")
  return Mesh(_arranged([sizes.get(name, 1) for name in AXES], devices), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(sizes, devices):
  try:
    return mesh_utils.create_device_mesh(sizes, devices)
  except NotImplementedError:
    # An axis of the mesh takes part of one of the torus, as 8 of 4x4x4.
    return mesh_utils.create_device_mesh(sizes, devices,
                                         allow_split_physical_axes=True)


def current():
  """The mesh that is set, as an abstract one, or None."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def unset():
  """A context in which no mesh is set, to trace what is not split by hand."""
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def axis_size(*names: str) -> int:
  """Devices along these axes of the mesh that is set; 1 without."""
  mesh = current()
  return 1 if mesh is None else math.prod(mesh.shape[name] for name in names)


def spec(*axes: str | None, fsdp: bool = True) -> P:
  """How an array of these logical axes is split (None: not at all).

  Raises:
    ValueError: an unknown axis, or two that claim one axis of the mesh.
  """
  table, taken, parts = rules(fsdp), {}, []
  for axis in axes:
    if axis is not None and axis not in table:
      raise ValueError(f"logical axis {axis!r}: use some of {tuple(table)}")
    part = (table[axis] if axis is not None else None) or ()
    for name in part:
      if name in taken:
        raise ValueError(
            f"array of {axes}: both {taken[name]!r} and {axis!r} would be "
            f"split over the mesh axis {name!r}; give one of them another "
            "logical axis")
      taken[name] = axis
    parts.append(part if len(part) > 1 else (*part, None)[0])
  return P(*parts)


def check_divides(what: str, shape, axes, mesh, fsdp: bool = True) -> None:
  """Raises ValueError unless each axis divides over the mesh's."""
  for size, axis in zip(shape, axes, strict=True):
    names = (rules(fsdp)[axis] if axis is not None else None) or ()
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
      over = " x ".join(f"{name}={mesh.shape[name]}" for name in names
                        if mesh.shape[name] > 1)
      raise ValueError(
          f"{what}: {axis}={size} does not divide over the mesh's {over}: "
          f"use {_divisors_near(size, parts)}"
          + (" devices in all" if len(names) > 1 else ""))


def _divisors_near(size: int, parts: int) -> str:
  """Up to six divisors, as text."""
  divisors = [n for n in range(1, size + 1) if size % n == 0]
  divisors.sort(key=lambda n: abs(math.log(n / parts)))
  *rest, last = map(str, sorted(divisors[:6]))
  return f"{', '.join(rest)} or {last}" if rest else last


def named_sharding(mesh, what: str, shape, axes, fsdp: bool = True):
  """The sharding of an array; ValueError if it does not divide."""
  check_divides(what, shape, axes, mesh, fsdp)
  return NamedSharding(mesh, spec(*axes, fsdp=fsdp))


def in_hand() -> bool:
  """Whether arrays are each device's own parts: inside `manual`."""
  mesh = current()
  return mesh is not None and set(mesh.axis_types) == {AxisType.Manual}


def whole_shape(shape, *axes: str) -> tuple[int, ...]:
  """The shape over all devices, inside `manual` too, of an array split by
  these logical axes."""
  if not in_hand():
    return tuple(shape)
  return tuple(size * axis_size(*RULES[axis])
               for size, axis in zip(shape, axes, strict=True))


def shard(x, *axes: str | None, fsdp: bool = True):
  """Says how XLA is to split x; x itself where no mesh is set."""
  mesh = current()
  if mesh is None or mesh.size == 1 or in_hand():
    return x
  return jax.lax.with_sharding_constraint(
      x, _automatic(mesh, spec(*axes, fsdp=fsdp)))


def _automatic(mesh, parts: P) -> P:
  """Without the axes that an enclosing `manual` has taken in hand."""
  manual_axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types)
                 if kind == AxisType.Manual}
  def visit(part):
    names = (part,) if isinstance(part, str) else part or ()
    names = tuple(name for name in names if name not in manual_axes)
    return names if len(names) > 1 else (*names, None)[0]
  return P(*map(visit, parts))


def manual(function, in_specs, out_specs):
  """`function` of each device's own parts, over all axes of the mesh that are
  not in hand already: itself where all are. Specs as for `jax.shard_map`, made
  by `spec`."""
  mesh = current()
  free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types)
          if kind != AxisType.Manual}
  if in_hand():
    return function
  specs = [jax.tree.map(functools.partial(_automatic, mesh), tree,
                        is_leaf=lambda x: isinstance(x, P))
           for tree in (in_specs, out_specs)]
  return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1],
                       axis_names=free)


def of_each(function, in_specs, out_specs):
  """`manual` under a mesh, `function` itself without."""
  return function if current() is None else manual(function, in_specs,
                                                   out_specs)


def gather(x, axis: int, logical: str, fsdp: bool = True):
  """Inside `manual`: all of an axis of x, of which each device has a part.

  One axis of the mesh after the other, fewest bytes first: XLA turns a gather
  over all devices of some slices into an all-reduce, of twice the bytes. So it
  does on TPU with the scatter that is its transpose where parts do not fill
  tiles of 128, but not of a dimension that is the devices', if that comes
  first in memory.
  """
  for name in reversed(rules(fsdp)[logical] or ()):
    shape = x.shape
    x = _gather(name, axis, x)
    x = x.reshape(*shape[:axis], -1, *shape[axis + 1:])
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(name: str, axis: int, x):
  return jax.lax.all_gather(x, name, axis=axis)


def _scatter(name, axis, _, dx):
  dx = jnp.moveaxis(dx, axis, 0)
  if axis:  # the first comes first of itself, in a layout that may be smaller
    dx = with_layout_constraint(dx, Layout(tuple(range(dx.ndim))))
  return (jax.lax.psum_scatter(dx, name),)


_gather.defvjp(lambda name, axis, x: (_gather(name, axis, x), None), _scatter)
