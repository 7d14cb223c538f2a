"""GGUF files: a header, read with care, and tensors, unread.

A header comes from strangers: each count, size and offset in it is compared
with the file's size before it is used. (The reader of the `gguf` package maps
arrays of whatever size the header says; its constants and its dequantization
are used here.)
"""
import functools
import math
import pathlib
import struct
import typing

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind, GGUFValueType as Value

from jaxlm.convert.tensors import Tensor
from pallas_kernels.quant import MXFP4

_FLOATS = {Kind.F32: np.dtype(np.float32), Kind.F16: np.dtype(np.float16),
           Kind.BF16: np.dtype(ml_dtypes.bfloat16)}
_BLOCKS = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K,
           Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL,
           Kind.IQ4_XS, Kind.MXFP4)
_NUMBERS = {Value.UINT8: "u1", Value.INT8: "i1", Value.UINT16: "<u2",
            Value.INT16: "<i2", Value.UINT32: "<u4", Value.INT32: "<i4",
            Value.UINT64: "<u8", Value.INT64: "<i8", Value.FLOAT32: "<f4",
            Value.FLOAT64: "<f8", Value.BOOL: "?"}
_CHUNK = 2 ** 20


class GGUFFile(typing.NamedTuple):
  """tensors: by name; what is quantized dequantizes when it is read.
  packed: of those in MXFP4, blocks and scales as published (`MXFP4`)."""
  metadata: dict[str, typing.Any]
  tensors: dict[str, Tensor]
  packed: dict[str, tuple[Tensor, Tensor]]


def read_file(path: pathlib.Path) -> GGUFFile:
  """The header of a file.

  Raises:
    ValueError: what it says is impossible for this file, or not supported.
  """
  try:
    with open(path, "rb") as file:
      size = file.seek(0, 2)
      file.seek(0)
      return _parse(path, _Header(file, size))
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} is no readable GGUF file: {error}") from error


class _Header:
  """Reads forward, never past the end."""

  def __init__(self, file, size: int):
    self._file, self.size, self.at = file, size, 0

  def require(self, count: int, itemsize: int, what: str) -> int:
    """Refuses a count of things that are not all in the file."""
    if count * itemsize > self.size - self.at:
      raise ValueError(f"{count} {what} from byte {self.at} of {self.size}: "
                       "it is damaged or was cut short")
    return count

  def take(self, count: int, what: str) -> bytes:
    self.require(count, 1, what)
    self.at += count
    return self._file.read(count)

  def numbers(self, dtype: str, count: int = 1) -> list:
    itemsize = np.dtype(dtype).itemsize
    self.require(count, itemsize, "numbers")
    return np.frombuffer(self.take(count * itemsize, "bytes"), dtype).tolist()

  def integer(self, code: str = "<I") -> int:
    return struct.unpack(code, self.take(struct.calcsize(code), "bytes"))[0]

  def string(self) -> str:
    return self.take(self.integer("<Q"), "bytes of text").decode()

  def value(self):
    kind = self.integer()
    if kind in _NUMBERS:
      return self.numbers(_NUMBERS[kind])[0]
    if kind == Value.STRING:
      return self.string()
    if kind != Value.ARRAY:
      raise ValueError(f"a value of the unknown type {kind}")
    kind, count = self.integer(), self.integer("<Q")
    if kind in _NUMBERS:
      return self.numbers(_NUMBERS[kind], count)
    if kind != Value.STRING:
      raise ValueError(f"an array of type {kind}, which is not supported")
    return [self.string() for _ in range(self.require(count, 8, "texts"))]


def _parse(path, header: _Header) -> GGUFFile:
  if header.take(4, "bytes") != b"GGUF":
    raise ValueError("it does not begin with GGUF")
  version = header.integer()
  if version not in (2, 3):
    raise ValueError(f"version {version} is not supported, only 2 and 3 "
                     "(little-endian)")
  num_tensors, num_values = header.integer("<Q"), header.integer("<Q")
  # A tensor takes at least 32 bytes of header, a value 13.
  header.require(num_tensors, 32, "tensors")
  metadata = {}
  for _ in range(header.require(num_values, 13, "values")):
    name = header.string()
    if name in metadata:
      raise ValueError(f"{name!r} occurs twice")
    metadata[name] = header.value()
  entries = [_entry(header) for _ in range(num_tensors)]
  alignment = metadata.get("general.alignment", 32)
  if type(alignment) is not int or alignment < 8 or alignment % 8:
    raise ValueError(f"general.alignment={alignment!r}: expected a multiple "
                     "of 8")
  start = -(-header.at // alignment) * alignment
  tensors, packed = {}, {}
  for name, shape, kind, offset in entries:
    if name in tensors:
      raise ValueError(f"tensor {name!r} occurs twice")
    nbytes = _nbytes(name, shape, kind)
    if start + offset + nbytes > header.size:
      raise ValueError(f"tensor {name!r} ends at byte {start + offset + nbytes}"
                       f" of {header.size}: it is damaged or was cut short")
    place = (path, start + offset, nbytes)
    dtype = _FLOATS.get(kind, np.dtype(np.float32))
    read = functools.partial(_read, *place, shape, kind, dtype)
    if kind == Kind.MXFP4:
      packed[name] = _packed(place, shape)
      dtype = MXFP4.dtype
      read = functools.partial(_dequantized, packed[name])
    tensors[name] = Tensor(shape, dtype, read)
  return GGUFFile(metadata, tensors, packed)


def _entry(header: _Header):
  name, num_axes = header.string(), header.integer()
  if not 1 <= num_axes <= 4:
    raise ValueError(f"tensor {name!r} has {num_axes} axes, expected 1 to 4")
  shape = tuple(reversed(header.numbers("<u8", num_axes)))
  if 0 in shape:
    raise ValueError(f"tensor {name!r} of shape {list(shape)} is empty")
  kind, offset = header.integer(), header.integer("<Q")
  if kind not in _FLOATS and kind not in _BLOCKS:
    known = Kind(kind).name if kind in iter(Kind) else "unknown"
    raise ValueError(
        f"tensor {name!r} is of type {kind} ({known}), which is not "
        f"supported: only {', '.join(k.name for k in (*_FLOATS, *_BLOCKS))}")
  return name, shape, Kind(kind), offset


def _nbytes(name, shape, kind: Kind) -> int:
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  if shape[-1] % block:
    raise ValueError(f"tensor {name!r} has rows of {shape[-1]}, but {kind.name}"
                     f" comes in blocks of {block}")
  return math.prod(shape) // block * block_bytes


def _chunks(path, start: int, nbytes: int, block_bytes: int):
  """The bytes in pieces of whole blocks."""
  with open(path, "rb") as file:
    file.seek(start)
    step = _CHUNK // block_bytes * block_bytes
    for begin in range(0, nbytes, step):
      count = min(step, nbytes - begin)
      data = np.fromfile(file, np.uint8, count)
      if len(data) < count:
        raise ValueError(f"{path} ends before byte {start + nbytes}: it was "
                         "cut short")
      yield data


def _read(path, start, nbytes, shape, kind: Kind, dtype) -> np.ndarray:
  result, at = np.empty(math.prod(shape), dtype), 0
  for data in _chunks(path, start, nbytes, gguf.GGML_QUANT_SIZES[kind][1]):
    with np.errstate(all="ignore"):  # a damaged scale may be infinite
      values = (data.view(dtype) if kind in _FLOATS
                else gguf.dequantize(data[None], kind)[0])
    result[at:at + len(values)] = values
    at += len(values)
  return result.reshape(shape)


def _packed(place, shape) -> tuple[Tensor, Tensor]:
  """Blocks and scales in the order of `MXFP4`.

  Here 16 bytes follow their scale, and hold the first 16 values of a block in
  their low and the others in their high nibbles.
  """
  *rows, dim_in = shape
  scales = (*rows, dim_in // 32)

  def read_blocks():
    result, at = np.empty((math.prod(scales), 16), np.uint8), 0
    for data in _chunks(*place, 17):
      data = data.reshape(-1, 17)[:, 1:]
      nibbles = np.concatenate([data & 15, data >> 4], 1)
      result[at:at + len(data)] = nibbles[:, ::2] | nibbles[:, 1::2] << 4
      at += len(data)
    return result.reshape(*scales, 16)

  def read_scales():
    return np.concatenate([data[::17] for data in _chunks(*place, 17)]
                          ).reshape(scales)

  return (Tensor((*scales, 16), np.dtype(np.uint8), read_blocks),
          Tensor(scales, np.dtype(np.uint8), read_scales))


def _dequantized(packed: tuple[Tensor, Tensor]) -> np.ndarray:
  return MXFP4(*(tensor.read() for tensor in packed)).dequantize().swapaxes(
      -1, -2)
