"""Converting needs memory for a few tensors, not for the model."""
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import jaxlm
from jaxlm import families
from jaxlm.convert import files, shards
from jaxlm.convert.checkpoint import leaf_shapes
from jaxlm.convert.rules import bind, their_shapes
from jaxlm.convert.tensors import Tensor

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = jaxlm.ModelConfig(
    vocab_size=9000, d_model=1024, num_layers=15,
    attention=jaxlm.AttentionConfig(8, 4, 128, jaxlm.RopeConfig(),
                                    qk_norm=True),
    moe=jaxlm.MoEConfig(32, 4, jaxlm.MLPConfig(512), jaxlm.RouterConfig()))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A checkpoint that is far larger than what may be used."""
  directory = tmp_path_factory.mktemp("memory") / "theirs"
  directory.mkdir()
  family, values = families.hf_family(CONFIG)
  files.write_json(directory / "config.json", values)
  some = np.random.default_rng(0).normal(size=10 ** 6).astype(
      ml_dtypes.bfloat16)
  shards.write_directory(directory, {
      name: Tensor(shape, some.dtype, lambda s=shape: np.resize(some, s))
      for name, shape in their_shapes(
          bind(family.rules, leaf_shapes(CONFIG))).items()},
      shard_bytes=10 ** 9)
  return directory


def peak_bytes(*arguments) -> int:
  """Of a command, in a process of its own."""
  code = ("import sys; from jaxlm import cli\n"
          "assert cli.main(sys.argv[1:]) == 0\n"
          "print(open('/proc/self/status').read())")
  shown = subprocess.run(
      [sys.executable, "-c", code, *map(str, arguments)], check=True,
      text=True, capture_output=True, cwd=ROOT).stdout
  line = next(x for x in shown.splitlines() if x.startswith("VmHWM"))
  return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"),
                    reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_converting(source, tmp_path, record_testsuite_property):
  total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
  largest = 2 * max(int(np.prod(shape)) for shape
                    in leaf_shapes(CONFIG).values())
  bound = 3 * largest + 500e6
  assert total > 2 * bound
  for name, arguments in (
      ("in", [source, tmp_path / "native"]),
      ("out", [tmp_path / "native", tmp_path / "back", "--to", "hf"])):
    peak = peak_bytes("convert", *arguments)
    record_testsuite_property(f"peak of converting {name}",
                              f"{peak / 1e6:.0f} of {bound / 1e6:.0f} MB")
    assert peak <= bound
  before, after = (shards.read_directory(d) for d in (source,
                                                      tmp_path / "back"))
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    np.testing.assert_array_equal(tensor.read().view(np.uint16),
                                  after[name].read().view(np.uint16))
