"""jaxlm's own layout: config.json, and each leaf a Zarr array below params/.

Arrays are stored as jaxlm computes with them, in chunks with checksums, by
TensorStore: tensorstore.open or any Zarr 3 library reads them too.
"""
import functools
import pathlib
from collections.abc import Callable

import numpy as np
import tensorstore

from jaxlm.config import ModelConfig
from jaxlm.config_dict import from_dict, to_dict
from jaxlm.convert import files
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes
from jaxlm.convert.tensors import Tensor, check, read_ahead
from pallas_kernels.quant import quantized_leaves

FORMAT = "jaxlm"
_CHUNK_BYTES = 64 * 2 ** 20


def recognizes(path: pathlib.Path) -> bool:
  config = path / "config.json"
  return config.is_file() and files.read_json(config).get("format") == FORMAT


def read(directory: pathlib.Path) -> Checkpoint:
  """The checkpoint in a directory, its tensors not read yet.

  Raises:
    ValueError: something is missing, damaged or does not fit.
  """
  values = files.read_json(directory / "config.json")
  if values.get("version") != 1:
    raise ValueError(f"{directory}: version={values.get('version')!r} of this "
                     "layout is not known: use a newer jaxlm")
  config = from_dict(ModelConfig, values.get("config"), "config")
  params = directory / "params"
  tensors = {str(path.parent.relative_to(params)): _open(path.parent)
             for path in sorted(params.rglob("zarr.json"))}
  shapes = leaf_shapes(config, quantized_leaves(tensors))
  check(directory, shapes, tensors)
  return Checkpoint(config, {path: tensors[path] for path in shapes},
                    values.get("about", {}), files.text_files(directory))


def _spec(path: pathlib.Path) -> dict:
  # A chunk that is not there is an error, so zeros are stored as well.
  return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"},
          "fill_missing_data_reads": False,
          "store_data_equal_to_fill_value": True}


def _open(path: pathlib.Path) -> Tensor:
  try:
    array = tensorstore.open(_spec(path), open=True, read=True).result()
  except Exception as error:  # of many types, whatever a stranger wrote
    raise ValueError(f"{path} cannot be read: {error}") from error
  return Tensor(tuple(array.shape), np.dtype(array.dtype.numpy_dtype),
                functools.partial(_read, path, array))


def _read(path, array) -> np.ndarray:
  try:
    return array.read().result()
  except Exception as error:
    raise ValueError(f"{path} cannot be read: {error}") from error


def write(checkpoint: Checkpoint, directory: pathlib.Path,
          progress: Callable[[int], None] = lambda nbytes: None) -> None:
  files.write_json(directory / "config.json", {
      "format": FORMAT, "version": 1, "config": to_dict(checkpoint.config),
      "about": checkpoint.about})
  for path, tensor, array in read_ahead(checkpoint.tensors):
    _write(directory / "params" / path, tensor, array)
    progress(tensor.nbytes)


def _write(path: pathlib.Path, tensor: Tensor, array: np.ndarray) -> None:
  rows = tensor.shape[0]
  rows = min(rows, max(1, _CHUNK_BYTES * rows // tensor.nbytes))
  metadata = {
      "chunk_grid": {"name": "regular", "configuration": {
          "chunk_shape": [rows, *tensor.shape[1:]]}},
      "codecs": [{"name": "bytes", "configuration": {"endian": "little"}},
                 {"name": "crc32c"}]}
  # Not flushed to the disk chunk by chunk, which takes ten times as long.
  context = tensorstore.Context({"file_io_sync": False})
  try:
    store = tensorstore.open(
        {**_spec(path), "metadata": metadata}, dtype=tensor.dtype,
        shape=tensor.shape, create=True, context=context).result()
    store.write(array, can_reference_source_data_indefinitely=True).result()
  except ValueError as error:
    raise OSError(f"{path.name}: {error}") from error
