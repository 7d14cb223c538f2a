"""What accelerators can do, by their makers' public figures."""
import dataclasses
import difflib
import math
import re

GIB = 2 ** 30


@dataclasses.dataclass(frozen=True)
class Device:
  """One device as jax counts them: a chip, or half of one of TPU v7x.

  hbm: bytes a program may use. flops: of bfloat16 matmuls a second.
  bandwidth: of HBM, bytes a second. link: bytes a second over one link, one
  way: to a torus neighbour (TPU), or out of a device to all others (GPU).
  topology: libtpu's name of the generation; None if it is no TPU. torus:
  dimensions of a slice. ring: sizes of a dimension from which on its ends are
  joined. domain: devices that the link reaches; others go over `network`.
  """
  name: str
  hbm: float
  flops: float
  bandwidth: float
  link: float
  topology: str | None = None
  torus: int = 0
  ring: int = 4
  domain: int = 8
  network: float = 50e9


def _tpu(name, hbm_gib, tflops, gbps, link_gbps, torus, ring, topology=None):
  return Device(name, hbm_gib * GIB, tflops * 1e12, gbps * 1e9,
                link_gbps * 1e9, topology or name, torus, ring)


def _gpu(name, hbm_gb, tflops, gbps, link_gbps, domain=8):
  return Device(name, hbm_gb * 1e9, tflops * 1e12, gbps * 1e9,
                link_gbps * 1e9, domain=domain)


# HBM of TPUs is what libtpu leaves to a program. v4 is compiled for with both
# its cores as one device.
DEVICES = {device.name: device for device in (
    _tpu("v4", 31.25, 275, 1228, 45, 3, 4),
    _tpu("v5e", 15.75, 197, 819, 45, 2, 16),
    _tpu("v5p", 95.74, 459, 2765, 90, 3, 4),
    _tpu("v6e", 31.25, 918, 1640, 90, 2, 16),
    _tpu("v7x", 94.75, 1153, 3690, 90, 3, 4, "tpu7x"),
    _gpu("a100", 80, 312, 2039, 300),
    _gpu("a100-40gb", 40, 312, 1555, 300),
    _gpu("h100", 80, 989, 3350, 450),
    _gpu("h200", 141, 989, 4800, 450),
    _gpu("b200", 180, 2250, 8000, 900),
    _gpu("l4", 24, 121, 300, 32),
    _gpu("l40s", 48, 362, 864, 32),
    _gpu("mi300x", 192, 1307, 5300, 448),
)}
ALIASES = {"tpu7x": "v7x", "7x": "v7x", "v5litepod": "v5e", "a100-80gb": "a100"}

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8",
          "8x8x8", "8x8x16", "8x16x16")
# Topologies that are offered, the smallest first.
SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": (*_CUBES, "16x16x16"),
          "v6e": _FLAT, "v7x": _CUBES}


@dataclasses.dataclass(frozen=True)
class Slice:
  """So many devices of one kind; `shape` is a TPU's torus, in chips."""
  device: Device
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape) * (2 if self.device.name == "v7x" else 1)

  @property
  def name(self) -> str:
    return f"{self.device.name}:{'x'.join(map(str, self.shape))}"

  def dimension_bandwidth(self, size: int) -> float:
    """Bytes a second that reach a chip along one dimension of the torus: from
    both sides of a ring; at the end of a line from one."""
    both = size % self.device.ring == 0
    return self.device.link * (2 if both else 1)

# Of a device that is not known, with the flags that say it.
_NEEDED = {"hbm": "--hbm-gb", "flops": "--tflops",
           "bandwidth": "--bandwidth-gbps"}


def parse_slice(text: str, **overrides: float) -> Slice:
  """"v5p:4x4x4", or "h100:8"; any other name with all `overrides`.

  Args:
    overrides: fields of `Device` that replace the known ones.

  Raises:
    ValueError: the name or the shape is not known.
  """
  name, _, shape = text.partition(":")
  name = ALIASES.get(name.lower(), name.lower())
  overrides = {k: v for k, v in overrides.items() if v is not None}
  device = DEVICES.get(name)
  if device is None:
    if missing := [flag for k, flag in _NEEDED.items() if k not in overrides]:
      near = difflib.get_close_matches(name, [*DEVICES, *ALIASES], 2)
      raise ValueError(
          f"slice {text!r}: {name!r} is not known: "
          + (f"did you mean {' or '.join(near)}? Or " if near else
             f"use one of {', '.join(DEVICES)}, or ")
          + f"give its figures too ({', '.join(missing)})")
    device = Device(name, *(overrides[k] for k in _NEEDED),
                    overrides.get("link", 32e9))
  device = dataclasses.replace(device, **overrides)
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ValueError(f"slice {text!r}: write {_example(device)}")
  sizes = tuple(map(int, shape.split("x")))
  if len(sizes) != max(device.torus, 1):
    raise ValueError(
        f"slice {text!r}: {device.name} has {max(device.torus, 1)} "
        f"dimension{'s'[:device.torus > 1]}: write {_example(device)}")
  return Slice(device, sizes)


def _example(device: Device) -> str:
  if device.torus:
    return " or ".join(f"{device.name}:{s}" for s in SLICES[device.name][2:5])
  return f"{device.name}:8 (devices)"
