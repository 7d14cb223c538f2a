"""Damaged checkpoints: thousands of them, and only clean errors."""
import json
import warnings

import ml_dtypes
import numpy as np
import pytest

from jaxlm.convert import formats, shards
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes
from jaxlm.convert.tensors import of_array
from reference_models import shrink

TRIALS = 1500


@pytest.fixture
def directory(tmp_path):
  config = shrink("gpt-oss-20b", 2)
  rng = np.random.default_rng(0)
  formats.write(Checkpoint(config, {
      path: of_array(rng.normal(size=shape).astype(ml_dtypes.bfloat16))
      for path, shape in leaf_shapes(config).items()}), tmp_path / "x", "hf")
  return tmp_path / "x"


def outcome(path) -> str:
  """What becomes of a checkpoint: an error must be one of these."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      for tensor in formats.read(path).tensors.values():
        assert tensor.read().shape == tensor.shape
  except (ValueError, NotImplementedError) as error:
    assert str(error)
    return "refused"
  return "read"


def flip(rng, content: bytearray):
  for _ in range(rng.integers(1, 4)):
    content[rng.integers(len(content))] = rng.integers(256)


def cut(rng, content: bytearray):
  del content[rng.integers(len(content)):]


def insert(rng, content: bytearray):
  at = rng.integers(len(content))
  content[at:at] = rng.bytes(rng.integers(1, 20))


def delete(rng, content: bytearray):
  at = rng.integers(len(content))
  del content[at:at + rng.integers(1, 20)]


def swap_words(rng, content: bytearray):
  """Digits and words by others, so that it often stays JSON."""
  digits = [i for i, c in enumerate(content[:5000]) if chr(c).isdigit()]
  for _ in range(rng.integers(1, 4)):
    content[digits[rng.integers(len(digits))]] = rng.choice(
        list(b"0123456789-e."))


@pytest.mark.parametrize("change", [flip, cut, insert, delete, swap_words])
def test_damaged_headers(change, directory):
  path = directory / "model.safetensors"
  whole, rng = path.read_bytes(), np.random.default_rng(1)
  header = 8 + int.from_bytes(whole[:8], "little")
  outcomes = []
  for _ in range(TRIALS // 5):
    content = bytearray(whole[:header])
    change(rng, content)
    path.write_bytes(content + whole[header:])
    outcomes.append(outcome(directory))
  # A digit or a blank may change nothing; most damage is seen.
  assert outcomes.count("refused") > len(outcomes) // 2


def test_damaged_entries(directory):
  """Headers that are JSON, with values that are not what they should be."""
  path = directory / "model.safetensors"
  whole, rng = path.read_bytes(), np.random.default_rng(2)
  header = 8 + int.from_bytes(whole[:8], "little")
  values = [None, True, -1, 0, 1.5, 2 ** 31, 2 ** 63, 2 ** 64, 10 ** 400, "",
            "F32", "BF16", "F64", [], [0], [-1, 2], [[1]], {}, {"a": 1},
            [2 ** 62, 2 ** 62], [0, 10 ** 30], "\ud800"]
  for _ in range(TRIALS // 3):
    entries = json.loads(whole[8:header])
    names = sorted(entries)
    entry = names[rng.integers(len(names))]
    value = values[rng.integers(len(values))]
    match rng.integers(4):
      case 0:
        entries[entry] = value
      case 1:
        entries[str(value)] = entries.pop(entry)
      case _:
        fields = entries[entry]
        fields[sorted(fields)[rng.integers(len(fields))]] = value
    content = json.dumps(entries).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content
                     + whole[header:])
    outcome(directory)


@pytest.mark.parametrize("change", [flip, cut, delete, swap_words])
def test_damaged_configs(change, directory):
  path = directory / "config.json"
  whole, rng = path.read_bytes(), np.random.default_rng(3)
  for _ in range(25):
    content = bytearray(whole)
    change(rng, content)
    path.write_bytes(content)
    outcome(directory)


def test_damaged_indices(directory, tmp_path):
  tensors = shards.read_directory(directory)
  (tmp_path / "y").mkdir()
  shards.write_directory(tmp_path / "y", tensors, shard_bytes=20_000)
  (tmp_path / "y/config.json").write_bytes(
      (directory / "config.json").read_bytes())
  assert outcome(tmp_path / "y") == "read"
  path = tmp_path / "y" / shards.INDEX
  whole, rng = path.read_bytes(), np.random.default_rng(4)
  for i in range(200):
    content = bytearray(whole)
    (flip, cut, insert, delete)[i % 4](rng, content)
    path.write_bytes(content)
    outcome(tmp_path / "y")


def test_damaged_native_metadata(directory, tmp_path):
  formats.write(formats.read(directory), tmp_path / "y")
  rng = np.random.default_rng(5)
  paths = sorted((tmp_path / "y" / "params").rglob("zarr.json"))
  for i in range(200):
    path = paths[rng.integers(len(paths))]
    whole = path.read_bytes()
    content = bytearray(whole)
    (flip, cut, delete, swap_words)[i % 4](rng, content)
    path.write_bytes(content)
    outcome(tmp_path / "y")
    path.write_bytes(whole)
  assert outcome(tmp_path / "y") == "read"
