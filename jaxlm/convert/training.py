"""What a training run saved, to read: the parameters of a checkpoint.

A path may be the workdir of one run, a run's own directory (WORKDIR/seed_0),
its `checkpoints`, of which the newest is taken, or one of those.
"""
import pathlib

from jaxlm.config import ModelConfig
from jaxlm.config_dict import from_dict
from jaxlm.convert import files
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes
from jaxlm.convert.tensors import check, of_array
from jaxlm.model.transformer import per_layer


def recognizes(path: pathlib.Path) -> bool:
  return bool(_found(path))


def _found(path: pathlib.Path) -> list[pathlib.Path]:
  """One checkpoint, or directories of them."""
  if (path / "about" / "metadata").is_file():
    return [path]
  places = path, path / "checkpoints", *sorted(path.glob("*/checkpoints"))
  return [place for place in places
          if any(place.glob("[0-9]*/about/metadata"))]


def read(path: pathlib.Path) -> Checkpoint:
  """The checkpoint, its parameters in the host's memory.

  All of them are read, as only a whole leaf can be verified, and a leaf has
  all layers of its kind.

  Raises:
    ValueError: it is damaged, or there are several runs or seeds.
  """
  # Orbax and the optimizers take long to import, and most never read these.
  from jaxlm.train.checkpoint import named_leaves, newest, read_step
  found = _found(path)
  if len(found) > 1:
    raise ValueError(f"{path} has several runs: name one of "
                     f"{', '.join(str(place.parent) for place in found)}")
  [where] = found
  if not (where / "about").is_dir():
    where = newest(where)
  state, about = read_step(where, "params/")
  if len(about["seeds"]) > 1:
    raise ValueError(f"{where} has the seeds {about['seeds']} together: train "
                     "the one that you want by itself")
  config = from_dict(ModelConfig, about["model"], "model")
  params = per_layer(config, state["params"])
  tensors = {name: of_array(x) for name, x in named_leaves(params).items()}
  shapes = leaf_shapes(config)
  check(where, shapes, tensors)
  return Checkpoint(config, {name: tensors[name] for name in shapes},
                    files=files.text_files(where.parent))
