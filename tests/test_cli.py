"""The console command: what it does, says and returns."""
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import jaxlm
from jaxlm import cli
from jaxlm.convert import formats
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes, named_leaves
from jaxlm.convert.tensors import of_array
from reference_models import shrink


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  config = shrink("qwen3-30b-a3b", 2)
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp("cli") / "theirs"
  formats.write(Checkpoint(config, {
      name: of_array(rng.normal(size=shape).astype(np.float32))
      for name, shape in leaf_shapes(config).items()}), path, "hf")
  return path


def test_convert(source, tmp_path, capsys):
  assert cli.main(["convert", str(source), str(tmp_path / "a")]) == 0
  assert "float32" in capsys.readouterr().out
  assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to",
                   "hf", "--dtype", "bfloat16"]) == 0
  expected = named_leaves(jaxlm.load(source, "bfloat16").params)
  for name, x in named_leaves(jaxlm.load(tmp_path / "b", None).params).items():
    np.testing.assert_array_equal(x, expected[name])


def test_inspect(source, capsys):
  assert cli.main(["inspect", str(source)]) == 0
  shown = capsys.readouterr().out
  for part in ("format: hf", "parameters: 1", '"num_experts": 11',
               "layers/{0..1}/moe/gate_up", "[11, 45, 46]", "float32"):
    assert part in shown


def test_failures_say_why(source, tmp_path, capsys):
  assert cli.main(["convert", str(tmp_path / "no"), str(tmp_path / "a")]) == 1
  assert "no does not exist" in capsys.readouterr().err
  assert cli.main(["convert", str(source), str(source)]) == 1
  assert "exists already" in capsys.readouterr().err
  assert cli.main(["convert", str(source), str(tmp_path / "a"), "--to",
                   "openai"]) == 1
  assert "gpt-oss alone" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [
    [], ["fly"], ["convert", "x"], ["convert", "x", "y", "--to", "onnx"],
    ["inspect", "x", "--dtype", "int3"]])
def test_wrong_usage_is_status_2(arguments, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main(arguments)
  assert stopped.value.code == 2
  assert "usage: jaxlm" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["convert"], ["inspect"]])
def test_help_is_quick_and_has_examples(arguments):
  code = ("import sys; from jaxlm import cli\n"
          "try: cli.main(sys.argv[1:])\n"
          "except SystemExit as stop: assert not stop.code\n"
          "assert 'jax' not in sys.modules and 'numpy' in sys.modules")
  shown = subprocess.run(
      [sys.executable, "-c", code, *arguments, "--help"], check=True, text=True,
      capture_output=True, cwd=pathlib.Path(__file__).parent.parent).stdout
  assert "examples:" in shown if arguments else "convert" in shown
