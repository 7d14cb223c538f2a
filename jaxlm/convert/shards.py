"""Safetensors files, single and sharded: read lazily, written as a stream.

The format's own library reads no 8-bit floats without torch, and writes only
what is in memory at once; a file is a header in JSON and the tensors' bytes.
"""
import functools
import json
import math
import pathlib
import struct
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxlm.convert import files
from jaxlm.convert.tensors import Tensor, contiguous, read_ahead, summarize

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10 ** 9
_LONGEST_HEADER = 100 * 10 ** 6

DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_}.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_directory(directory: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of the safetensors files in a directory.

  Raises:
    ValueError: there are none, or they are damaged or inconsistent.
  """
  index = directory / INDEX
  if index.is_file():
    return _read_indexed(directory, files.read_json(index))
  paths = [directory / "model.safetensors"]
  if not paths[0].is_file():
    paths = sorted(directory.glob("*.safetensors"))
  if not paths:
    raise ValueError(f"{directory} has no safetensors files"
                     + _about_pickles(directory))
  tensors = {}
  for path in paths:
    for name, tensor in read_file(path).items():
      if name in tensors:
        raise ValueError(f"{path}: {name} is in another file of {directory} "
                         "too: remove the one that does not belong there")
      tensors[name] = tensor
  return tensors


def _about_pickles(directory: pathlib.Path) -> str:
  pickled = [path.name for pattern in _PICKLED
             for path in sorted(directory.glob(pattern))]
  if not pickled:
    return ""
  return (f", only {pickled[0]}: such a file is a program (a pickle) and is "
          "not opened here. Write safetensors with its own library, such as "
          "transformers' model.save_pretrained(DIRECTORY)")


def _read_indexed(directory, index: dict) -> dict[str, Tensor]:
  where, places = directory / INDEX, index.get("weight_map")
  if not isinstance(places, dict) or not all(
      isinstance(place, str) for place in places.values()):
    raise ValueError(f"{where}: weight_map is no map of names to files")
  shards = {}
  for place in sorted(set(places.values())):
    if pathlib.PurePath(place).name != place or "\\" in place or "\0" in place:
      raise ValueError(f"{where}: {place!r} is no file's name in the same "
                       "directory")
    if not (directory / place).is_file():
      raise ValueError(f"{where}: {place} is absent: the download is not "
                       "complete")
    shards[place] = read_file(directory / place)
  absent = [name for name, place in places.items()
            if name not in shards[place]]
  if absent:
    raise ValueError(f"{where}: not in the files it names: "
                     f"{', '.join(summarize(absent))}")
  return {name: shards[place][name] for name, place in places.items()}


def read_file(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one file, none of them read yet.

  Raises:
    ValueError: what the header says is impossible for this file.
  """
  try:
    with open(path, "rb") as file:
      size = file.seek(0, 2)
      file.seek(0)
      length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
      if length > min(_LONGEST_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
      entries = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    return _parse(path, entries, 8 + length, size)
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{path} is no readable safetensors file: {error}"
                     ) from error


def _no_duplicates(pairs) -> dict:
  result = dict(pairs)
  if len(result) != len(pairs):
    raise ValueError("a name occurs twice")
  return result


def _parse(path, entries, start: int, size: int) -> dict[str, Tensor]:
  if not isinstance(entries, dict):
    raise ValueError("the header is no JSON object")
  entries.pop("__metadata__", None)
  tensors, ranges = {}, []
  for name, entry in entries.items():
    try:
      dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
      begin, end = entry["data_offsets"]
      whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
      whole = False
    if not whole or end - begin != math.prod(shape) * dtype.itemsize:
      raise ValueError(f"{name!r} is described by {str(entry)[:200]}")
    ranges.append((begin, end))
    tensors[name] = Tensor(shape, dtype, functools.partial(
        _read, path, start + begin, shape, dtype))
  # Every byte belongs to one tensor.
  at = 0
  for begin, end in sorted(ranges):
    if begin != at:
      raise ValueError(f"tensors overlap or leave a gap at byte {at}")
    at = end
  if start + at != size:
    raise ValueError(f"tensors end at byte {start + at} of {size}")
  return tensors


def _read(path, offset: int, shape, dtype) -> np.ndarray:
  # Not mapped: a mapped file that shrinks ends the process without a word.
  nbytes = math.prod(shape) * dtype.itemsize
  try:
    data = np.fromfile(path, np.uint8, nbytes, offset=offset)
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  if len(data) < nbytes:
    raise ValueError(f"{path} cannot be read: it ends {nbytes - len(data)} "
                     "bytes too early")
  return data.view(dtype).reshape(shape)


def write_directory(directory: pathlib.Path, tensors: dict[str, Tensor],
                    progress: Callable[[int], None] = lambda nbytes: None,
                    shard_bytes: int = SHARD_BYTES) -> None:
  """Writes tensors one after the other, in shards with an index if several.

  Args:
    progress: called with the bytes of each tensor that has been written.
  """
  shards, filled = [{}], 0
  for name, tensor in tensors.items():
    if shards[-1] and filled + tensor.nbytes > shard_bytes:
      shards.append({})
      filled = 0
    shards[-1][name] = tensor
    filled += tensor.nbytes
  names = ["model.safetensors"]
  if len(shards) > 1:
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
             for i in range(len(shards))]
    files.write_json(directory / INDEX, {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {name: file for file, shard in zip(names, shards)
                       for name in shard}})
  for file, shard in zip(names, shards, strict=True):
    _write_file(directory / file, shard, progress)


def _write_file(path, tensors: dict[str, Tensor], progress) -> None:
  # Wide ones first: readers want each aligned to its width.
  tensors = dict(sorted(tensors.items(), key=lambda t: -t[1].dtype.itemsize))
  entries, at = {"__metadata__": {"format": "pt"}}, 0
  for name, tensor in tensors.items():
    entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape,
                     "data_offsets": [at, at + tensor.nbytes]}
    at += tensor.nbytes
  header = json.dumps(entries, separators=(",", ":")).encode()
  header += b" " * (-len(header) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header)
    for _, tensor, array in read_ahead(tensors):
      file.write(contiguous(array).reshape(-1).view(np.uint8))
      progress(tensor.nbytes)
