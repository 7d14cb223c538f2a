"""Checkpoints that are of another run, damaged or not finite."""
import gc
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from jaxlm.parallel.mesh import make_mesh
from jaxlm.train.checkpoint import (CheckpointError, Checkpoints,
                                    newest, read_step)

# Damaged files leave tensorstore futures that nobody asks for their error.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning")

EXPECTED = {"model": {"num_layers": 3, "norm": {"eps": 1e-5}}}


@pytest.fixture(scope="module", autouse=True)
def _while_that_is_ignored():
  yield
  gc.collect()


def state(value: float):
  noise = jax.random.normal(jax.random.key(0), (64, 33))
  return {"params": {"mlp": {"down": noise + value}, "scale": jnp.ones(7)},
          "count": jnp.int32(value)}


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Of steps 1 to 4, the last three."""
  directory = tmp_path_factory.mktemp("saved") / "checkpoints"
  checkpoints = Checkpoints(directory, keep=3)
  for step in range(1, 5):
    checkpoints.save(step, state(step), EXPECTED | {"data": [step]})
  checkpoints.close()
  return directory


@pytest.fixture
def directory(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restore(directory, tree=None, expected=None):
  return Checkpoints(directory, keep=3).restore(
      abstract(state(0) if tree is None else tree), expected or EXPECTED)


def test_the_newest_comes_back_whole(saved):
  assert sorted(p.name for p in saved.iterdir()) == ["2", "3", "4"]
  restored, about = restore(saved)
  assert about["step"] == 4 and about["data"] == [4]
  jax.tree.map(np.testing.assert_array_equal, restored, state(4))


def test_nothing_to_restore(tmp_path):
  assert restore(tmp_path / "new") is None


def test_another_config_is_refused_by_its_fields(saved):
  other = {"model": {"num_layers": 4, "norm": {"eps": 1e-6}}}
  with pytest.raises(ValueError, match=(
      "saved by another run: model.num_layers=3 there, 4 here; "
      "model.norm.eps=1e-05 there, 1e-06 here")):
    restore(saved, expected=other)


def test_all_leaves_that_differ_are_named_at_once(saved):
  tree = state(0)
  tree["params"]["mlp"] = {"down": jnp.ones((33, 64), jnp.bfloat16),
                           "up": jnp.ones(3)}
  del tree["count"]
  with pytest.raises(ValueError) as error:
    restore(saved, tree)
  for part in ("missing params/mlp/up", "unexpected count",
               "params/mlp/down is float32[64, 33], expected "
               "bfloat16[33, 64]"):
    assert part in str(error.value)


def largest(directory, step) -> pathlib.Path:
  return max((path for path in (directory / str(step)).rglob("*")
              if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path):
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


DAMAGES = {"truncated": truncate, "deleted": pathlib.Path.unlink,
           "flipped": flip}


@pytest.mark.parametrize("file", ["data", "description"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    directory, damage, file):
  path = (largest(directory, 4) if file == "data"
          else directory / "4" / "about" / "metadata")
  DAMAGES[damage](path)
  with pytest.warns(RuntimeWarning, match="step 4 is damaged.*from step 3"):
    restored, about = restore(directory)
  assert about["step"] == 3
  jax.tree.map(np.testing.assert_array_equal, restored, state(3))
  # It is kept, and its step can be saved again.
  assert len(list(directory.with_name("checkpoints-damaged").iterdir())) == 1
  checkpoints = Checkpoints(directory, keep=3)
  checkpoints.save(4, state(4), EXPECTED)
  checkpoints.close()
  assert restore(directory)[1]["step"] == 4


def restored_after_a_flip(directory, path, rng, end=None) -> int:
  """The step that is restored when one bit of a file of step 4 is another;
  it is as it was saved, and all is put back."""
  content = path.read_bytes()
  flipped = bytearray(content)
  flipped[rng.randrange(end or len(flipped))] ^= 1 << rng.randrange(8)
  path.write_bytes(flipped)
  restored, about = restore(directory)
  jax.tree.map(np.testing.assert_array_equal, restored, state(about["step"]))
  for aside in directory.with_name("checkpoints-damaged").glob("4-*"):
    aside.rename(directory / "4")
  path.write_bytes(content)
  return about["step"]


@pytest.mark.filterwarnings("ignore:the checkpoint of step 4 is damaged")
def test_each_of_100_flipped_bits_of_the_data_is_detected(directory):
  path, rng = largest(directory, 4), random.Random(0)
  # Arrays, each a frame of zstd; the last is an index that is no longer read.
  end = path.read_bytes().rindex(b"\x28\xb5\x2f\xfd")
  assert end > 0.9 * path.stat().st_size
  assert [restored_after_a_flip(directory, path, rng, end)
          for _ in range(100)] == [3] * 100


@pytest.mark.filterwarnings("ignore:the checkpoint of step 4 is damaged")
def test_a_flipped_bit_of_any_file_is_detected_or_without_effect(directory):
  rng = random.Random(1)
  files = sorted(path for path in (directory / "4").rglob("*")
                 if path.is_file())
  found = {restored_after_a_flip(directory, path, rng)
           for path in files for _ in range(3)}
  assert found == {3, 4}


LAYOUTS = [({"data": 8}, P("data"), P(None, "data")),
           ({"data": 2, "expert": 4}, P(("data", "expert")), P("expert")),
           ({"data": 2, "tensor": 2}, P("tensor", "data"), P()),
           (None, None, None)]


def laid_out(tree, layout):
  sizes, *specs = layout
  if sizes is None:
    return jax.device_put(tree, jax.devices()[0])
  devices = jax.devices()[:np.prod(list(sizes.values()))]
  mesh = make_mesh(sizes, devices)
  return {name: jax.device_put(x, NamedSharding(mesh, spec))
          for (name, x), spec in zip(tree.items(), specs, strict=True)}


@pytest.mark.parametrize("before", range(4))
def test_restored_onto_other_devices_bit_identical(tmp_path, before):
  tree = {name: jax.random.normal(jax.random.key(i), (16, 8 * (i + 3)), dtype)
          for i, (name, dtype) in enumerate(
              {"w": jnp.float32, "v": jnp.bfloat16}.items())}
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
  checkpoints.save(1, laid_out(tree, LAYOUTS[before]), EXPECTED)
  checkpoints.wait()
  for layout in LAYOUTS:
    wanted = laid_out(tree, layout)
    restored, _ = checkpoints.restore(abstract(wanted), EXPECTED)
    for name, leaf in restored.items():
      assert leaf.sharding == wanted[name].sharding
      np.testing.assert_array_equal(np.asarray(leaf), np.asarray(tree[name]))
  checkpoints.close()


def test_the_best_are_kept_besides_the_newest(tmp_path):
  losses = [5.0, 2.0, None, 3.0, 2.5, 4.0, None, 6.0]
  for step, loss in enumerate(losses):
    # As after a restart, when what was saved before has to be read.
    checkpoints = Checkpoints(tmp_path, keep=2, keep_best=2)
    checkpoints.save(step, state(step), EXPECTED, eval_loss=loss)
    checkpoints.close()
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [1, 4, 6, 7]
  assert restore(tmp_path)[1]["eval_loss"] == 6.0


def test_a_digit_changed_in_the_description_is_damage(directory):
  path = directory / "4" / "about" / "metadata"
  path.write_text(path.read_text().replace('"num_layers": 3',
                                           '"num_layers": 8'))
  with pytest.warns(RuntimeWarning, match="its description is damaged"):
    assert restore(directory)[1]["step"] == 3


def test_none_good_is_an_error_and_deletes_nothing(directory):
  for step in (2, 3, 4):
    flip(largest(directory, step))
  before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
  with pytest.raises(CheckpointError, match="no checkpoint can be read, 4: .*"
                                            "3: .*2: .*Put back a copy"):
    restore(directory)
  assert before == {p: p.read_bytes() for p in directory.rglob("*")
                    if p.is_file()}


def test_what_is_not_finite_is_not_saved(directory):
  bad = state(5)
  bad["params"]["scale"] = bad["params"]["scale"].at[3].set(jnp.nan)
  checkpoints = Checkpoints(directory, keep=3)
  with pytest.raises(FloatingPointError, match="params/scale is not finite"):
    checkpoints.save(5, bad, EXPECTED)
  checkpoints.close()
  assert restore(directory)[1]["step"] == 4


def test_saving_does_not_see_what_a_donated_state_becomes(tmp_path):
  add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree),
                donate_argnums=0)
  current = {"w": jnp.zeros((256, 1024))}
  checkpoints = Checkpoints(tmp_path, keep=9)
  for step in range(5):
    checkpoints.save(step, current, EXPECTED)
    for _ in range(10):
      current = add(current)
  checkpoints.close()
  restored, _ = restore(tmp_path, current)
  assert np.all(np.asarray(restored["w"]) == 40)


def test_an_unwritable_directory_is_named(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(CheckpointError, match="file/checkpoints: a checkpoint "
                                            "cannot be written"):
    Checkpoints(tmp_path / "file" / "checkpoints", keep=2)


def test_the_newest_is_read_without_knowing_the_model(saved):
  before = sorted(saved.rglob("*"))
  found, about = read_step(newest(saved))
  assert about["step"] == 4 and about["model"] == EXPECTED["model"]
  jax.tree.map(np.testing.assert_array_equal, found, state(4))
  assert sorted(saved.rglob("*")) == before


def test_a_damaged_one_is_not_read(directory):
  metadata = directory / "4" / "about" / "metadata"
  metadata.write_text(metadata.read_text().replace('"step": 4', '"step": 5'))
  with pytest.raises(CheckpointError, match="4 cannot be read: its descr"):
    read_step(newest(directory))
  with pytest.raises(CheckpointError, match="elsewhere has no checkpoint"):
    newest(directory.parent / "elsewhere")
