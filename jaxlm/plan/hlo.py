"""What a compiled program sends between devices, read from its HLO text."""
import dataclasses
import math
import re

import numpy as np

from jaxlm.plan.flops import RARELY

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all",
         "ragged-all-to-all", "collective-permute", "collective-broadcast")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation|"
                     r"called_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  shape: str
  opcode: str
  text: str

  def attribute(self, pattern: str) -> str | None:
    match = re.search(pattern, self.text)
    return match and match[1]

  @property
  def op_name(self) -> str:
    """Where it comes from in the program that was traced."""
    return self.attribute(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective, run `times` times a step.

  axes: of the mesh, along which it goes. size: devices that take part in one
  group. bytes: of the whole array that is gathered, scattered or sent. wire:
  bytes that each device receives, each time.
  degraded: it was written as this kind, but became an all-reduce, which sends
  twice the bytes.
  """
  kind: str
  axes: tuple[str, ...]
  size: int
  bytes: float
  wire: float
  times: float
  op_name: str
  degraded: str | None = None


def collectives(text: str, mesh_shape: dict[str, int]) -> list[Collective]:
  """The collectives of a compiled program.

  Loops count as often as they go round (once if that is not known; not at all
  in a scope named "rarely"). TPUs spell
  a reduce-scatter as an all-reduce in a fusion of its own, and cut one
  collective in pieces that run beside computation: those count once.
  """
  return _Reader(text, mesh_shape).read()


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Instructions by computation, and the name of the entry."""
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if line[:1] in ("%", "E") and line.rstrip().endswith("{"):
      match = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
      current = computations.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (found := _instruction(line.strip())):
      current.append(found)
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
  if not equals:
    return None
  if rest.startswith("("):
    depth = 0
    for end, letter in enumerate(rest, 1):
      depth += (letter == "(") - (letter == ")")
      if not depth:
        break
  else:
    end = rest.find(" ")
  opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
  return opcode and Instruction(name.lstrip("%"), rest[:end], opcode[1],
                                rest[end:])


def array_bytes(shape: str) -> list[float]:
  """Bytes of each array that a shape names."""
  sizes = []
  for dtype, dims in _SHAPE.findall(shape):
    bits = re.search(r"\d+", dtype)
    each = _BYTES.get(dtype, int(bits[0]) / 8 if bits else 1)
    sizes.append(each * math.prod(int(n) for n in dims.split(",") if n))
  return sizes


class _Reader:

  def __init__(self, text: str, mesh_shape: dict[str, int]):
    self.computations, self.entry = parse(text)
    self.mesh_shape = mesh_shape
    self.found: dict[tuple, Collective] = {}

  def read(self) -> list[Collective]:
    self._walk(self.entry, 1, False, ())
    return list(self.found.values())

  def _walk(self, name: str, times: float, fragments: bool, path):
    for index, instruction in enumerate(self.computations.get(name, ())):
      kind = instruction.opcode.removesuffix("-start")
      if f"/{RARELY}/" in instruction.op_name:
        continue
      if kind in KINDS:
        self._add(name, instruction, kind, times,
                  None if fragments else (*path, name, index))
      elif instruction.opcode == "while":
        body = instruction.attribute(r"body=%?([\w.\-]+)")
        self._walk(body, times * self._trips(instruction), fragments,
                   (*path, name, index))
      else:
        for called in self._called(instruction):
          self._walk(called, times, fragments or "async_collective" in called,
                     (*path, name, index))

  def _called(self, instruction):
    names = _CALLED.findall(instruction.text)
    branches = instruction.attribute(r"branch_computations=\{([^}]*)\}")
    names += re.findall(r"[\w.\-]+", branches or "")
    return [name for name in names if name in self.computations]

  def _trips(self, loop) -> int:
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    test = self.computations.get(
        loop.attribute(r"condition=%?([\w.\-]+)"), [])
    # i < constant, or a fusion of that alone.
    root = test[-1] if test else None
    if root is None or root.opcode not in ("compare", "fusion"):
      return 1
    operands = re.findall(r"%([\w.\-]+)", root.text.partition(")")[0])
    limits = [int(found[1]) for x in test if x.name in operands
              and (found := re.match(r"\s*constant\((\d+)\)", x.text))]
    return limits[0] if len(limits) == 1 else 1

  def _add(self, computation, instruction, kind, times, place):
    size, axes = self._group(instruction)
    if size < 2:
      return
    arrays = array_bytes(instruction.shape)
    started = instruction.opcode.endswith("-start")
    scattered = kind == "all-reduce" and computation.startswith(
        "all-reduce-scatter")
    if kind == "ragged-all-to-all":
      # The larger one is a buffer for the worst case.
      whole = min(n for n in array_bytes(self._operand_shapes(
          computation, instruction)) if n >= max(arrays) / 1000)
    elif kind == "reduce-scatter":
      whole = max(arrays) * (1 if started else size)
    elif started and kind == "all-reduce":
      whole = sum(arrays) / (2 if len(arrays) > 1 else 1)
    elif started:
      whole = max(arrays)
    else:
      whole = sum(arrays)
    kind = "reduce-scatter" if scattered else kind
    op_name, share = instruction.op_name, (size - 1) / size
    wire = whole * {"all-reduce": 2 * share, "collective-broadcast": 1,
                    "collective-permute": self._moved(instruction)
                    }.get(kind, share)
    chain = instruction.attribute(r'chain_id="(\d+)"')
    key = (("chain", chain, kind, axes) if chain else place
           or (kind, axes, whole, op_name,
               instruction.attribute(r"stack_frame_id=(\d+)")))
    if key in self.found and self.found[key].times >= times:
      return
    self.found[key] = Collective(
        kind, axes, size, whole, wire, times, op_name,
        self._degraded(computation, instruction, kind, whole, size))

  def _degraded(self, computation, instruction, kind, whole, size):
    if kind != "all-reduce":
      return None
    last = instruction.op_name.rpartition("/")[2]
    if last.startswith(("all_gather", "all-gather")):
      return "all-gather"
    if last.startswith(("reduce_scatter", "psum_scatter")):
      return "reduce-scatter"
    # All of the sum is made, and each device takes its part.
    users = list(self._users(computation, instruction))
    part = 1.1 * whole / size
    return "reduce-scatter" if users and all(
        any(sum(array_bytes(one.shape)) <= part for one in self._slices(x))
        for x in users) else None

  def _users(self, computation, instruction):
    """Who uses a value, past those that only pass it on."""
    name = re.compile(rf"%{re.escape(instruction.name)}[,)]")
    for x in self.computations[computation]:
      if not name.search(x.text):
        continue
      if x.opcode in ("get-tuple-element", "bitcast", "copy", "copy-start",
                      "copy-done"):
        yield from self._users(computation, x)
      else:
        yield x

  def _slices(self, instruction) -> list[Instruction]:
    """Those that an instruction is, or is made of."""
    parts = [instruction, *(x for name in self._called(instruction)
                            for x in self.computations[name])]
    return [x for x in parts if x.opcode == "dynamic-slice"]

  def _operand_shapes(self, computation, instruction) -> str:
    names = re.findall(r"%([\w.\-]+)", instruction.text.partition(")")[0])
    return " ".join(x.shape for x in self.computations[computation]
                    if x.name in names[:2])

  def _moved(self, instruction) -> float:
    """The share of devices that receive something."""
    return len(_pairs(instruction)) / math.prod(self.mesh_shape.values())

  def _group(self, instruction) -> tuple[int, tuple[str, ...]]:
    if pairs := _pairs(instruction):
      return 2, self._axes(pairs)
    groups = _groups(instruction, math.prod(self.mesh_shape.values()))
    return len(groups[0]), self._axes(groups[:1])

  def _axes(self, groups) -> tuple[str, ...]:
    """Those along which the members of a group differ."""
    differ = np.zeros(len(self.mesh_shape), bool)
    for group in groups:
      places = np.array(np.unravel_index(group,
                                         tuple(self.mesh_shape.values())))
      differ |= (places != places[:, :1]).any(1)
    return tuple(name for name, yes in zip(self.mesh_shape, differ) if yes)


def _pairs(instruction) -> list[list[int]]:
  text = instruction.attribute(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
  return [list(map(int, pair.split(","))) for pair in
          re.findall(r"\{(\d+,\d+)\}", text or "")]


def _groups(instruction, num_devices: int) -> list[list[int]]:
  text = instruction.text
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
    # Axes of a mesh of its own, first to last; groups are along some of them.
    sizes = {name: int(n) for name, n in
             re.findall(r"'([^']+)'=(\d+)", match[1])}
    along = re.findall(r"'([^']+)'", match[2])
    order = [name for name in sizes if name not in along] + along
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    ids = ids.transpose([list(sizes).index(name) for name in order])
    return ids.reshape(-1, math.prod(sizes[name] for name in along)).tolist()
  if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\]"
                        r"(?:T\(([\d,]+)\))?", text):
    shape, dims = (list(map(int, match[i].split(","))) for i in (1, 2))
    order = map(int, match[3].split(",")) if match[3] else range(len(dims))
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(list(order))
    return ids.reshape(shape).tolist()
  if match := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", text):
    return [list(map(int, group.split(",")))
            for group in re.findall(r"\{([\d,]+)\}", match[1])]
  return [list(range(num_devices))]
