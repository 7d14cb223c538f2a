"""Named tensors that are read one at a time.

Every format reads into, and writes from, a dict of these. A leaf is named by
its path in the per-layer parameters, such as layers/0/moe/gate_up; a quantized
one is two tensors, such as layers/0/moe/gate_up/blocks and .../scales.
"""
import concurrent.futures
import importlib
import itertools
import math
import re
import typing
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np


FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
          "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Tensor(typing.NamedTuple):
  """What a tensor is, known without reading it, and how to read it.

  `read()` gives an array of that shape and dtype, perhaps not contiguous,
  perhaps a view: not to be written to.
  """
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def of_array(array) -> Tensor:
  """A tensor that is in memory already, here or on a device."""
  return Tensor(tuple(array.shape), np.dtype(array.dtype),
                lambda: np.asarray(array))


def cast(tensors: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
  """The same tensors, floating ones in another dtype (None: as they are).

  Balance biases stay as they are: a router's choice is by sums with them that
  differ by less than a short float tells apart.

  Raises:
    ValueError: an unknown dtype now; a value too large for it when read.
  """
  if dtype is None:
    return tensors
  if dtype not in FLOATS:
    raise ValueError(f"dtype={dtype!r}: use one of {tuple(FLOATS)}")
  target = FLOATS[dtype]
  as_they_are = (*_quant().KINDS, "balance_bias")

  def read(name, tensor):
    array = tensor.read()
    with np.errstate(over="ignore"):
      result = contiguous(array).astype(target)
    if target == np.float16 and (np.isinf(result) & np.isfinite(array)).any():
      raise ValueError(f"{name} has values beyond float16's largest, 65504: "
                       "use bfloat16 or float32")
    return result

  return {
      name: (Tensor(tensor.shape, target,
                    lambda name=name, tensor=tensor: read(name, tensor))
             if tensor.dtype in FLOATS.values() and tensor.dtype != target
             and name.rpartition("/")[2] not in as_they_are else tensor)
      for name, tensor in tensors.items()}


def contiguous(array: np.ndarray) -> np.ndarray:
  """The same values, in order in memory."""
  if array.flags.c_contiguous:
    return array
  result = np.empty(array.shape, array.dtype)
  copy_into(result, array)
  return result


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
  """target[...] = source, where one may be the other transposed.

  That is done in blocks which fit into the cache: five times as fast as
  numpy's own order, which goes through whole columns.
  """
  target, source = _merge_axes(target, source)
  rows, columns = _fastest_axis(target), _fastest_axis(source)
  if rows == columns:
    target[...] = source
    return
  index = [slice(None)] * target.ndim
  for i in range(0, target.shape[rows], 64):
    index[rows] = slice(i, i + 64)
    for j in range(0, target.shape[columns], 2048):
      index[columns] = slice(j, j + 2048)
      target[tuple(index)] = source[tuple(index)]


def _merge_axes(*arrays: np.ndarray) -> list[np.ndarray]:
  """Views of arrays of one shape, without what both can do without: axes that
  go on where the next ends, and axes of size 1."""
  sizes, strides = [], [[] for _ in arrays]
  for axis, size in enumerate(arrays[0].shape):
    if size == 1:
      continue
    here = [array.strides[axis] for array in arrays]
    if sizes and all(s[-1] == size * stride
                     for s, stride in zip(strides, here)):
      sizes[-1] *= size
      for s, stride in zip(strides, here):
        s[-1] = stride
    else:
      sizes.append(size)
      for s, stride in zip(strides, here):
        s.append(stride)
  return [np.lib.stride_tricks.as_strided(array, sizes, s)
          for array, s in zip(arrays, strides)]


def _fastest_axis(array: np.ndarray) -> int | None:
  """Along which neighbours in memory lie; None in what has no extent."""
  strides = {axis: stride for axis, (size, stride)
             in enumerate(zip(array.shape, array.strides)) if size > 1}
  return min(strides, key=strides.get, default=None)


def read_ahead(tensors: dict[str, Tensor]
               ) -> Iterator[tuple[str, Tensor, np.ndarray]]:
  """Reads tensors in order, each while the one before it is being used."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    coming = None
    for name, tensor in tensors.items():
      before, coming = coming, (name, tensor, pool.submit(tensor.read))
      if before:
        yield (*before[:2], before[2].result())
        before = None  # or its array would stay while the next but one is read
    if coming:
      yield (*coming[:2], coming[2].result())


def check(where, expected: dict[str, tuple[int, ...]],
          found: dict[str, Tensor]) -> None:
  """Refuses tensors that do not fit, naming all of them.

  Raises:
    ValueError: some are missing, unexpected, of another shape or of a dtype
      that is no weight's.
  """
  problems, quant = [], _quant()
  for title, names in (
      ("missing", [name for name in expected if name not in found]),
      ("unexpected", [name for name in found if name not in expected])):
    if names:
      problems.append(f"{title}: {', '.join(summarize(names))}")
  for name, shape in expected.items():
    if name not in found:
      continue
    if found[name].shape != tuple(shape):
      problems.append(f"{name} is {list(found[name].shape)}, expected "
                      f"{list(shape)}")
    part, wanted = name.rpartition("/")[2], tuple(FLOATS.values())
    if part in quant.KINDS:
      wanted = (quant.KINDS[part].PARTS[part],)
    elif name.endswith(tuple(quant.MXFP4.PARTS)):
      wanted = (np.dtype(np.uint8),)
    if found[name].dtype not in wanted:
      problems.append(f"{name} is {found[name].dtype}, expected "
                      f"{' or '.join(map(str, wanted))}")
  if problems:
    raise ValueError(f"{where}: the tensors do not fit the config:\n  "
                     + "\n  ".join(problems))


def _quant():
  """Needs jax, and the families, which are known without it, need this file."""
  return importlib.import_module("pallas_kernels.quant")


_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")


def summarize(names) -> list[str]:
  """All the names, those that differ only in numbers as one with ranges."""
  groups = {}
  for name in names:
    # The text between numbers, and the numbers.
    parts = _NUMBER.split(name)
    groups.setdefault(tuple(parts[::2]), []).append((name, parts[1::2]))
  result = []
  for texts, members in groups.items():
    columns = [sorted(set(map(int, column)))
               for column in zip(*(numbers for _, numbers in members))]
    whole = all(column == list(range(column[0], column[-1] + 1))
                for column in columns)
    if whole and math.prod(map(len, columns)) == len(members):
      ranges = [str(column[0]) if len(column) == 1
                else f"{{{column[0]}..{column[-1]}}}" for column in columns]
      result.append("".join(itertools.chain.from_iterable(
          itertools.zip_longest(texts, ranges, fillvalue=""))))
    else:
      result += [name for name, _ in members]
  return result
