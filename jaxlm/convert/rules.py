"""Rules between our names and layouts and another format's, both ways.

  Rule("layers/{layer}/attention/q_proj",
       "model.layers.{layer}.self_attn.q_proj.weight", "(N H) D -> D N H")

says that their tensor's two axes, the first of which is heads times head size,
are ours in another order. The letters stand for sizes, which our shapes give.
A rule holds wherever its path of ours exists in the model, so one list serves
models with and without an optional weight.

Several of theirs for one of ours are stacked on leading axes first. The fields
of the name that are not in ours, such as {expert}, come before the list:

  Rule("layers/{layer}/moe/gate_up",
       ("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"),
       "E C F D -> E D (C F)")

Several of ours from one of theirs are its parts along `axis` of theirs, each
of which the pattern rearranges with sizes of its own:

  Rule(("layers/{layer}/attention/q_proj", ".../k_proj", ".../v_proj"),
       "block.{layer}.attn.qkv.weight", "(N H) D -> D N H", axis=0)
"""
import dataclasses
import functools
import itertools
import math
import re
import string
from collections.abc import Callable, Iterator

import numpy as np

from jaxlm.convert.tensors import Tensor, check, contiguous, copy_into

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
  ours: str | tuple[str, ...]
  theirs: str | tuple[str, ...]
  pattern: str
  axis: int | None = None

  def __post_init__(self):
    for name in ("ours", "theirs"):
      value = getattr(self, name)
      object.__setattr__(self, name,
                         (value,) if isinstance(value, str) else value)
    left, right = self.sides
    stacked = len(self.theirs) > 1 or bool(self.stack_fields)
    letters = sorted(sum(left, ()))
    if letters != sorted(sum(right, ())) or len(set(letters)) < len(letters):
      raise ValueError(f"pattern={self.pattern!r}: the two sides need the "
                       "same letters, each once")
    if (len(self.ours) > 1) != (self.axis is not None) or (
        stacked and self.axis is not None):
      raise ValueError(f"{self}: axis says where one of theirs splits into "
                       "several of ours")

  @functools.cached_property
  def sides(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Letters of each axis, of theirs and of ours."""
    left, right = self.pattern.split("->")
    return tuple(
        [tuple((group or letter).split())
         for group, letter in re.findall(r"\(([^)]*)\)|(\S+)", side)]
        for side in (left, right))

  @functools.cached_property
  def stack_fields(self) -> list[str]:
    """Fields of their names that number tensors of one leaf of ours."""
    return [field for field in _fields(self.theirs[0])
            if field not in _fields(self.ours[0])]


@dataclasses.dataclass(frozen=True)
class Unit:
  """A rule at one place: these of ours from those of theirs.

  `sizes` are of the letters, for each of ours.
  """
  rule: Rule
  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  shapes: tuple[Shape, ...]
  sizes: tuple[dict[str, int], ...]

  @property
  def _num_stacked(self) -> int:
    return len(self.rule.stack_fields) + (len(self.rule.theirs) > 1)

  def _part_shape(self, sizes) -> Shape:
    """Of one of theirs, or of the part of it that one of ours is."""
    left = self.rule.sides[0][self._num_stacked:]
    return tuple(math.prod(sizes[letter] for letter in group)
                 for group in left)

  def their_shape(self) -> Shape:
    parts = [self._part_shape(sizes) for sizes in self.sizes]
    axis = self.rule.axis
    if axis is None:
      return parts[0]
    return (*parts[0][:axis], sum(part[axis] for part in parts),
            *parts[0][axis + 1:])

  def _as_theirs(self, array, sizes):
    """A view of our array with an axis for each letter, in their order."""
    left, right = (sum(side, ()) for side in self.rule.sides)
    return array.reshape([sizes[letter] for letter in right]).transpose(
        [right.index(letter) for letter in left])

  def to_ours(self, read: Callable[[str], np.ndarray],
              dtype: np.dtype) -> list[np.ndarray]:
    """Our tensors from theirs, read one at a time, each straight into place."""
    left, right = self.rule.sides
    if left == right and not self._num_stacked and self.rule.axis is None:
      return [read(self.theirs[0])]
    outputs = [np.empty(shape, dtype) for shape in self.shapes]
    targets = [self._as_theirs(output, sizes)
               for output, sizes in zip(outputs, self.sizes)]
    if self.rule.axis is not None:
      array = read(self.theirs[0])
      for target, part in zip(targets, self._parts(), strict=True):
        copy_into(target, array[part].reshape(target.shape))
      return outputs
    counts = targets[0].shape[:self._num_stacked]
    for name, index in zip(self.theirs, np.ndindex(*counts), strict=True):
      target = targets[0][index]
      copy_into(target, read(name).reshape(target.shape))
    return outputs

  def to_theirs(self, read: Callable[[str], np.ndarray],
                dtype: np.dtype) -> list[np.ndarray]:
    """Their tensors from ours, as views where that can be."""
    sources = [self._as_theirs(contiguous(read(path)), sizes)
               for path, sizes in zip(self.ours, self.sizes)]
    shape = self.their_shape()
    if self.rule.axis is not None:
      output = np.empty(shape, dtype)
      for source, part in zip(sources, self._parts(), strict=True):
        copy_into(output[part].reshape(source.shape), source)
      return [output]
    counts = sources[0].shape[:self._num_stacked]
    return [sources[0][index].reshape(shape) for index in np.ndindex(*counts)]

  def _parts(self) -> list[tuple[slice, ...]]:
    """Where each of ours is in the one of theirs that they make together."""
    ends = list(itertools.accumulate(
        self._part_shape(sizes)[self.rule.axis] for sizes in self.sizes))
    return [(slice(None),) * self.rule.axis + (slice(begin, end),)
            for begin, end in zip([0, *ends], ends)]


def bind(rules, shapes: dict[str, Shape]) -> list[Unit]:
  """The rules at every leaf of a model, given by path and shape.

  Of several rules for one path the first holds.

  Raises:
    ValueError: leaves for which there is no rule.
  """
  units, done, without = [], set(), []
  for path in shapes:
    if path in done:
      continue
    unit = next(filter(None, (_bind_one(rule, path, shapes)
                              for rule in rules)), None)
    if unit is None:
      without.append(path)
    else:
      units.append(unit)
      done.update(unit.ours)
  if without:
    raise ValueError("this format has no place for "
                     f"{', '.join(sorted(without))}")
  return units


def _bind_one(rule: Rule, path: str, shapes) -> Unit | None:
  for template in rule.ours:
    match = re.fullmatch(_regex(template), path)
    if match:
      break
  else:
    return None
  fields = match.groupdict()
  ours = tuple(template.format(**fields) for template in rule.ours)
  if not all(name in shapes for name in ours):
    return None
  our_shapes = tuple(tuple(shapes[name]) for name in ours)
  num_stacked = len(rule.stack_fields)
  known = {}
  if len(rule.theirs) > 1:
    known[rule.sides[0][num_stacked][0]] = len(rule.theirs)
  sizes = tuple(_sizes(rule, shape, dict(known)) for shape in our_shapes)
  counts = [sizes[0][group[0]] for group in rule.sides[0][:num_stacked]]
  theirs = tuple(
      template.format(**fields, **dict(zip(rule.stack_fields, index)))
      for index in itertools.product(*map(range, counts))
      for template in rule.theirs)
  return Unit(rule, ours, theirs, our_shapes, sizes)


def _sizes(rule: Rule, shape: Shape, known: dict[str, int]) -> dict[str, int]:
  """The letters' sizes, from the shape of ours."""
  groups = rule.sides[1]
  if len(groups) != len(shape):
    raise ValueError(f"{rule}: the leaf has shape {shape}")
  for group, size in zip(groups, shape):
    unknown = [letter for letter in group if letter not in known]
    rest, remainder = divmod(
        size, math.prod(known.get(letter, 1) for letter in group))
    if remainder or len(unknown) > 1 or not unknown and rest != 1:
      raise ValueError(f"{rule}: axis ({' '.join(group)}) of size {size} does "
                       "not tell the size of each letter")
    known |= {letter: rest for letter in unknown}
  return known


def their_shapes(units: list[Unit]) -> dict[str, Shape]:
  return {name: unit.their_shape() for unit in units for name in unit.theirs}


def to_ours(units: list[Unit], theirs: dict[str, Tensor],
            where: str) -> dict[str, Tensor]:
  """Our tensors by path, read from theirs when they are read.

  Tensors that one rule makes together are best read one after the other, each
  once: they are made once and each let go when it has been handed out.

  Raises:
    ValueError: theirs are not just those that the rules need.
  """
  check(where, their_shapes(units), theirs)
  read = lambda name: theirs[name].read()
  return dict(itertools.chain.from_iterable(
      _together(unit.ours, unit.shapes, dtype, functools.partial(
          unit.to_ours, read, dtype))
      for unit in units for dtype in [_dtype(theirs, unit.theirs)]))


def to_theirs(units: list[Unit],
              ours: dict[str, Tensor]) -> dict[str, Tensor]:
  """Their tensors by name, made from ours when they are read (see to_ours)."""
  read = lambda path: ours[path].read()
  return dict(itertools.chain.from_iterable(
      _together(unit.theirs, (unit.their_shape(),) * len(unit.theirs),
                dtype, functools.partial(unit.to_theirs, read, dtype))
      for unit in units for dtype in [_dtype(ours, unit.ours)]))


def _dtype(tensors: dict[str, Tensor], names) -> np.dtype:
  """One that holds what is in all of them."""
  return functools.reduce(np.promote_types,
                          {tensors[name].dtype for name in names})


def _together(names, shapes, dtype, make) -> Iterator[tuple[str, Tensor]]:
  ready = {}

  def read(name):
    if name not in ready:
      ready.update(zip(names, make(), strict=True))
    return ready.pop(name)

  for name, shape in zip(names, shapes, strict=True):
    yield name, Tensor(shape, dtype, lambda name=name: read(name))


def _fields(template: str) -> list[str]:
  return [field for _, field, *_ in string.Formatter().parse(template)
          if field]


def _regex(template: str) -> str:
  return "".join(
      re.escape(text) + (f"(?P<{field}>[^/]+)" if field else "")
      for text, field, *_ in string.Formatter().parse(template))
