"""Safetensors files: read as they are written, and damaged ones refused."""
import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from jaxlm.convert import shards
from jaxlm.convert.tensors import of_array


def file_with(path, header, data=b"", length=None):
  header = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(header) if length is None else length
  path.write_bytes(struct.pack("<Q", length) + header + data)
  return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def arrays():
  rng = np.random.default_rng(0)
  return {"odd": rng.integers(0, 256, (3, 7)).astype(np.uint8),
          "half": rng.normal(size=(5, 3)).astype(np.float16),
          "brain": rng.normal(size=(2, 3, 5)).astype(ml_dtypes.bfloat16),
          "eight": rng.normal(size=11).astype(ml_dtypes.float8_e4m3fn),
          "full": rng.normal(size=(7, 2)).astype(np.float32).T,
          "none": np.zeros((0, 3), np.float32),
          "scalar": np.float32(4.5)}


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype and found[name].shape == x.shape
    np.testing.assert_array_equal(found[name].read(), x)


@pytest.mark.parametrize("shard_bytes", [10 ** 9, 70, 1])
def test_what_is_written_is_read(tmp_path, shard_bytes):
  expected, done = arrays(), []
  shards.write_directory(tmp_path,
                         {name: of_array(x) for name, x in expected.items()},
                         done.append, shard_bytes)
  assert_same(shards.read_directory(tmp_path), expected)
  assert sum(done) == sum(x.nbytes for x in expected.values())
  assert (tmp_path / shards.INDEX).exists() == (shard_bytes < 10 ** 9)


def test_the_formats_own_library_reads_it(tmp_path):
  expected = {name: x for name, x in arrays().items() if name != "eight"}
  shards.write_directory(tmp_path,
                         {name: of_array(x) for name, x in expected.items()})
  path = tmp_path / "model.safetensors"
  found = safetensors.torch.load_file(path)
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name].float().numpy(), x)
  with safetensors.safe_open(path, "pt") as file:
    assert file.metadata() == {"format": "pt"}


def test_what_its_own_library_writes_is_read(tmp_path):
  tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.uint8),
             "c": torch.randn(2, 3).to(torch.float8_e4m3fn)}
  safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
  found = shards.read_directory(tmp_path)
  for name, x in tensors.items():
    np.testing.assert_array_equal(found[name].read().astype(np.float32),
                                  x.float().numpy())


BAD_HEADERS = {
    "not json": b"{",
    "no object": b"[1]",
    "deep": b"[" * 100_000,
    "not utf-8": b'{"\xff": 1}',
    "twice": b'{"a": {}, "a": {}}',
    "no entry": {"a": 3},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "unknown dtype": {"a": entry("F4")},
    "dtype a list": {"a": entry(["F32"])},
    "negative size": {"a": entry(shape=(-2,))},
    "size a float": {"a": entry(shape=(2.0,))},
    "size true": {"a": entry(shape=(True, 2))},
    "shape a number": {"a": {"dtype": "F32", "shape": 2,
                             "data_offsets": [0, 8]}},
    "too large": {"a": entry(shape=(2 ** 62, 4), offsets=(0, 2 ** 66))},
    "wrong length": {"a": entry(shape=(3,))},
    "backwards": {"a": entry(shape=(0,), offsets=(8, 0))},
    "past the end": {"a": entry(offsets=(4, 12))},
    "one offset": {"a": entry(offsets=(0,))},
    "gap": {"a": entry(shape=(1,), offsets=(4, 8))},
    "overlap": {"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))},
    "rest": {"a": entry(shape=(1,), offsets=(0, 4))},
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_impossible_headers_are_refused(what, tmp_path):
  path = file_with(tmp_path / "model.safetensors", BAD_HEADERS[what], b"x" * 8)
  with pytest.raises(ValueError, match="model.safetensors is no readable"):
    shards.read_file(path)


@pytest.mark.parametrize("length", [0, 7, 2 ** 20, 10 ** 8 + 1, 2 ** 63,
                                    2 ** 64 - 1])
def test_impossible_lengths_are_refused(length, tmp_path):
  path = file_with(tmp_path / "x.safetensors", {"a": entry()}, b"x" * 8, length)
  with pytest.raises(ValueError, match="x.safetensors is no readable"):
    shards.read_file(path)


def test_a_truncated_file_is_refused(tmp_path):
  path = file_with(tmp_path / "x.safetensors", {"a": entry()}, b"x" * 8)
  whole = path.read_bytes()
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match="x.safetensors is no readable"):
      shards.read_file(path)


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path):
  path = file_with(tmp_path / "x.safetensors", {"a": entry()}, b"x" * 8)
  tensors = shards.read_file(path)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match="x.safetensors cannot be read"):
    tensors["a"].read()


def index(tmp_path, weight_map):
  (tmp_path / shards.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "a/b",
                                   "..", "", ".", "a\\b", "x\0y"])
def test_an_index_does_not_lead_out_of_its_directory(place, tmp_path):
  index(tmp_path, {"a": place})
  with pytest.raises(ValueError, match="no file's name|absent"):
    shards.read_directory(tmp_path)


def test_an_index_of_absent_files_or_tensors_is_refused(tmp_path):
  file_with(tmp_path / "x.safetensors", {"a": entry()}, b"x" * 8)
  index(tmp_path, {"a": "y.safetensors"})
  with pytest.raises(ValueError, match="y.safetensors is absent"):
    shards.read_directory(tmp_path)
  index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
  with pytest.raises(ValueError, match="not in the files it names: b"):
    shards.read_directory(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}",
                                     '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(content, tmp_path):
  (tmp_path / shards.INDEX).write_text(content)
  with pytest.raises(ValueError, match="index.json"):
    shards.read_directory(tmp_path)


def test_a_name_in_two_files_is_refused(tmp_path):
  for name in ("x", "y"):
    file_with(tmp_path / f"{name}.safetensors", {"a": entry()}, b"x" * 8)
  with pytest.raises(ValueError, match="a is in another file"):
    shards.read_directory(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_with_the_remedy(name, tmp_path):
  torch.save({"a": torch.zeros(3)}, tmp_path / name)
  with pytest.raises(ValueError, match=f"{name}.*pickle.*save_pretrained"):
    shards.read_directory(tmp_path)
