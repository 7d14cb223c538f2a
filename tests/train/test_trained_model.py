"""What a run saved, loaded as any checkpoint."""
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.cli import main
from jaxlm.config_dict import to_dict
from jaxlm.convert import formats
from jaxlm.data import load_tokenizer
from jaxlm.model.transformer import init_params, per_layer
from jaxlm.train import train
from jaxlm.train.checkpoint import Checkpoints
import toy_training as toy

pytestmark = pytest.mark.usefixtures("program_cache")


@pytest.fixture(scope="module")
def loaded(whole_run):
  return jaxlm.load(whole_run.workdir, dtype=None)


def assert_same(lm, other):
  assert lm.config == other.config and lm.files == other.files
  jax.tree.map(np.testing.assert_array_equal, lm.params, other.params)


def test_the_newest_parameters_are_read(whole_run, loaded):
  assert loaded.config == toy.DENSE
  jax.tree.map(np.testing.assert_array_equal, loaded.params,
               per_layer(toy.DENSE, whole_run.result.params))


def test_any_of_its_directories_will_do(whole_run, loaded):
  run = whole_run.workdir / "seed_7"
  for path in (run, run / "checkpoints", run / "checkpoints" / "40"):
    assert formats.format_of(path) == "training"
    assert_same(jaxlm.load(path, dtype=None), loaded)
  earlier = jaxlm.load(run / "checkpoints" / "35", dtype=None)
  assert (earlier.params["embed"]["embedding"]
          != loaded.params["embed"]["embedding"]).any()


def test_the_tokenizer_comes_with_it(loaded):
  text = "12 13 größer\n\t<|end_of_document|> \0"
  own, trained_with = loaded.tokenizer, load_tokenizer("bytes")
  assert own.encode(text).tolist() == trained_with.encode(text).tolist()
  assert own.decode(own.encode(text)) == text
  assert (own.vocab_size, own.end_of_document, own.fim) == (
      trained_with.vocab_size, trained_with.end_of_document, trained_with.fim)
  assert (own.token_bytes() == trained_with.token_bytes()).all()
  assert loaded.stop_tokens == (256,)


def test_it_is_converted_and_goes_on_with_numbers(whole_run, loaded, tmp_path,
                                                  capsys):
  target = tmp_path / "model"
  assert main(["convert", str(whole_run.workdir), str(target), "--dtype",
               "float32"]) == 0
  assert_same(jaxlm.load(target, dtype=None), loaded)
  capsys.readouterr()
  assert main(["generate", str(whole_run.workdir), "--prompt", "31 32 33 34",
               "--max-new-tokens", "6", "--temperature", "0"]) == 0
  assert len(capsys.readouterr().out) == 7  # of so small a model mostly spaces


def test_layers_of_a_kind_are_taken_apart(tmp_path):
  params = init_params(toy.MOE, jax.random.key(3))
  about = {"seeds": [3], "model": to_dict(toy.MOE)}
  for name, told in (("one", about), ("two", about | {"seeds": [3, 4]})):
    checkpoints = Checkpoints(tmp_path / name / "checkpoints", 1)
    checkpoints.save(1, {"params": params, "step": jnp.int32(1)}, told)
    checkpoints.close()
  lm = jaxlm.load(tmp_path / "one", dtype=None)
  assert lm.config == toy.MOE and lm.tokenizer is None
  jax.tree.map(np.testing.assert_array_equal, lm.params,
               per_layer(toy.MOE, params))
  with pytest.raises(ValueError, match=r"the seeds \[3, 4\] together"):
    jaxlm.load(tmp_path / "two")


def test_a_refused_run_leaves_the_tokenizer(whole_run, tmp_path):
  shutil.copytree(whole_run.workdir / "seed_7", tmp_path / "seed_7")
  path = tmp_path / "seed_7" / "checkpoints" / "tokenizer.json"
  path.write_text("another")
  other = dataclasses.replace(toy.TRAIN, z_loss=0.5)
  with pytest.raises(ValueError, match="saved by another run"):
    train(toy.DENSE, other, toy.counting_data(), tmp_path, seeds=(7,))
  assert path.read_text() == "another"


def test_several_runs_and_damage_are_refused(whole_run, tmp_path):
  run = shutil.copytree(whole_run.workdir / "seed_7", tmp_path / "seed_7")
  other = shutil.copytree(run, tmp_path / "seed_8")
  with pytest.raises(ValueError, match="several runs: name one of .*seed_8"):
    jaxlm.load(tmp_path)
  about = other / "checkpoints" / "40" / "about" / "metadata"
  about.write_text(about.read_text().replace('"seeds": [7]', '"seeds": [8]'))
  with pytest.raises(ValueError, match="40 cannot be read"):
    jaxlm.load(other)
  shutil.rmtree(run / "checkpoints")
  shutil.rmtree(other)
  with pytest.raises(ValueError, match="the workdir of a training run"):
    jaxlm.load(tmp_path)
