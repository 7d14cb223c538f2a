"""Checkpoints that are whole, of this run, and as they were written.

Orbax writes them, in the background and atomically, each process the parts of
the arrays that its devices have. It cannot tell a flipped bit, so a fingerprint
of every leaf is kept beside them. How the arrays are split is no part of a
checkpoint: they may be restored onto other devices than they were saved from.
"""
import json
import pathlib
import warnings
import zlib

from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm.parallel.multihost import everyone, is_main
from jaxlm.train.fingerprint import fingerprints


class CheckpointError(ValueError):
  """A checkpoint cannot be written, or none of those there can be read."""


class Checkpoints:
  """The newest `keep` checkpoints of a run and the `keep_best` of the least
  eval_loss, DIRECTORY/STEP.

  Each has the leaves of a pytree and `about`, a JSON-able dict. With several
  processes all make the same calls, and the directory is one for all.
  """

  def __init__(self, directory, keep: int, keep_best: int = 0):
    self._directory = pathlib.Path(directory).absolute()
    self._eval_loss = {}
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
          self._directory, options=ocp.CheckpointManagerOptions(
              preservation_policy=_Preserve(keep, keep_best, self._loss_of),
              cleanup_tmp_directories=True, create=False,
              multiprocessing_options=_processes(range(jax.process_count()))))
    except OSError as error:
      raise self._unwritable(error) from error

  def save(self, step: int, state, about: dict,
           eval_loss: float | None = None) -> None:
    """Begins to save; `state` may be donated when this returns.

    Raises:
      FloatingPointError: a leaf is not finite; nothing is saved.
      CheckpointError: this or the previous checkpoint cannot be written.
    """
    leaves = named_leaves(state)
    found = fingerprints(leaves)
    for name, (_, finite) in found.items():
      if not finite:
        raise FloatingPointError(f"{name} is not finite")
    about = {**about, "step": step, "eval_loss": eval_loss, "leaves": {
        name: [*_shape_dtype(leaf), found[name][0]]
        for name, leaf in leaves.items()}}
    self._eval_loss[step] = eval_loss
    try:
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(
              traverse_util.unflatten_dict(leaves, sep="/")),
          about=ocp.args.JsonSave({"crc32": _text_crc32(about), **about})))
    except Exception as error:  # orbax's and tensorstore's share no base
      raise self._unwritable(error) from error

  def check(self) -> None:
    """Raises CheckpointError if a save in the background has failed."""
    self._reraise(self._manager.check_for_errors)

  def wait(self) -> None:
    """Until all is on disk."""
    self._reraise(self._manager.wait_until_finished)

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def _reraise(self, function):
    try:
      function()
    except Exception as error:
      raise self._unwritable(error) from error

  def _unwritable(self, error) -> CheckpointError:
    return CheckpointError(
        f"{self._directory}: a checkpoint cannot be written "
        f"({_first_line(error)}): free space on that disk, or choose a workdir "
        "on another, and run again; what was saved before is unharmed")

  def restore(self, abstract, expected: dict):
    """(state, about) of the newest good checkpoint, or None without any.

    Damaged ones that are newer are moved to DIRECTORY-damaged, with a warning.

    Args:
      abstract: the state, as ShapeDtypeStructs with shardings.
      expected: entries that `about` must have.

    Raises:
      ValueError: the checkpoint is of another run, or its leaves differ.
      CheckpointError: there are checkpoints, all of them damaged.
    """
    damaged = {}
    for step in everyone(sorted(self._manager.all_steps(), reverse=True))[0]:
      where = self._directory / str(step)
      about, why = _try(_read_about, where)
      if not why:
        check_same(where, about, expected)
        check_leaves(where, about["leaves"], abstract)
        state, why = _try(_read_state, where, abstract)
      why = why or _changed(about, state)
      if not why:
        self._move_aside(damaged, step)
        return state, about
      damaged[step] = why
    if damaged:
      raise CheckpointError(
          f"{self._directory}: no checkpoint can be read, "
          + "; ".join(f"{step}: {why}" for step, why in damaged.items())
          + ". Put back a copy, or move the directory away to begin anew")
    return None

  def _loss_of(self, step: int) -> float | None:
    """The eval_loss a checkpoint was saved with, if any."""
    if step not in self._eval_loss:
      try:
        self._eval_loss[step] = _read_about(
            self._directory / str(step))["eval_loss"]
      except (OSError, ValueError, KeyError):
        self._eval_loss[step] = None
    return self._eval_loss[step]

  def _move_aside(self, damaged: dict[int, str], good: int) -> None:
    if not damaged:
      return
    if is_main():
      for step, why in damaged.items():
        aside = self._directory.with_name(f"{self._directory.name}-damaged")
        aside.mkdir(exist_ok=True)
        target = aside / f"{step}-{len(list(aside.iterdir()))}"
        (self._directory / str(step)).rename(target)
        warnings.warn(f"the checkpoint of step {step} is damaged ({why}): "
                      f"moved to {target}; going on from step {good}",
                      RuntimeWarning)
    everyone("moved")
    self._manager.reload()


def newest(directory) -> pathlib.Path:
  """Where the newest checkpoint of a run lies; CheckpointError without any."""
  directory = pathlib.Path(directory).absolute()
  steps = [int(path.name) for path in directory.glob("*")
           if path.name.isdecimal()]
  if not steps:
    raise CheckpointError(f"{directory} has no checkpoint: train with that "
                          "directory and keep what it saves")
  return directory / str(max(steps))


def read_step(where: pathlib.Path, only: str = "") -> tuple[dict, dict]:
  """(state, about) of one checkpoint, for whoever looks at a run.

  Nothing there is changed. The state is a nested dict by the names of the
  leaves (params, opt_state, ...), in the host's memory; `about` has what the
  run put there (seeds, model, train), and step, eval_loss and leaves.

  Args:
    only: the leaves whose names begin with it.

  Raises:
    CheckpointError: it is damaged.
  """
  state = None
  about, why = _try(_read_about, where)
  if not why:
    about["leaves"] = {name: leaf for name, leaf in about["leaves"].items()
                       if name.startswith(only)}
    state, why = _try(_read_state, where, traverse_util.unflatten_dict({
        name: np.broadcast_to(np.zeros((), dtype), shape)  # takes no memory
        for name, (shape, dtype, _) in about["leaves"].items()}, sep="/"))
  why = why or _changed(about, state)
  if why:
    raise CheckpointError(f"{where} cannot be read: {why}. Put back a copy, or "
                          "remove it and train on from the one before")
  return state, about


def _read_about(where: pathlib.Path) -> dict:
  about = json.loads((where / "about" / "metadata").read_bytes())
  if about.pop("crc32") != _text_crc32(about):
    raise ValueError("its description is damaged")
  return about


def _read_state(where: pathlib.Path, abstract):
  tree = traverse_util.unflatten_dict(named_leaves(abstract), sep="/")
  # Each for itself: who waits for one that failed would wait long.
  alone = _processes([jax.process_index()])
  with ocp.Checkpointer(
      ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
      multiprocessing_options=alone) as reader:
    tree = reader.restore(where / "state", args=ocp.args.PyTreeRestore(
        tree, ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True))
  leaves = traverse_util.flatten_dict(tree, sep="/")
  return jax.tree.unflatten(jax.tree.structure(abstract),
                            [leaves[name] for name in named_leaves(abstract)])


class _Preserve:
  """Which checkpoints stay when a new one is there, as orbax asks it."""

  def __init__(self, keep: int, keep_best: int, loss_of):
    self._keep, self._keep_best, self._loss_of = keep, keep_best, loss_of

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    stay = set(steps[-self._keep:])
    if self._keep_best:
      losses = {step: self._loss_of(step) for step in steps}
      told = [step for step in steps if losses[step] is not None]
      stay |= set(sorted(told, key=losses.get)[:self._keep_best])
    return [checkpoint.step in stay for checkpoint in checkpoints]


def _processes(indices) -> ocp.options.MultiprocessingOptions:
  """Orbax waits for these processes, and the first does what one must do."""
  if jax.process_count() == 1:
    return ocp.options.MultiprocessingOptions()
  return ocp.options.MultiprocessingOptions(
      primary_host=indices[0], active_processes=set(indices))


def _try(function, *args):
  """(result, ""), or why it failed here or in another process."""
  result, why = None, ""
  try:
    result = function(*args)
  except Exception as error:  # whatever orbax makes of damaged files
    why = _first_line(error)
  return result, next(filter(None, everyone(why)), "")


def _changed(about: dict, state) -> str:
  """Which leaves are not as they were saved."""
  found = fingerprints(named_leaves(state))
  wrong = [name for name, (*_, saved) in about["leaves"].items()
           if found[name][0] != saved]
  return f"not as it was saved: {', '.join(wrong)}" if wrong else ""


def named_leaves(tree) -> dict:
  """Leaves by path, such as params/stack_0/layer_1/mlp/down."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree.leaves_with_path(tree)}


def check_same(where, about: dict, expected: dict) -> None:
  """Refuses a checkpoint of another run, naming what differs."""
  def flat(tree):
    tree = json.loads(json.dumps(tree))
    return traverse_util.flatten_dict(tree, keep_empty_nodes=True, sep=".")
  there = flat({name: about.get(name) for name in expected})
  here = flat(expected)
  differ = [f"{name}={there.get(name)!r} there, {here.get(name)!r} here"
            for name in {**there, **here} if there.get(name) != here.get(name)]
  if differ:
    raise ValueError(f"{where} was saved by another run: {'; '.join(differ)}. "
                     "Choose another workdir, or run with what it was saved "
                     "with")


def check_leaves(where, saved: dict, abstract) -> None:
  """Compares names, shapes and dtypes of all leaves, and reports all."""
  wanted = {name: _shape_dtype(leaf)
            for name, leaf in named_leaves(abstract).items()}
  found = {name: entry[:2] for name, entry in saved.items()}
  problems = [f"missing {name}" for name in wanted if name not in found]
  problems += [f"unexpected {name}" for name in found if name not in wanted]
  problems += [
      f"{name} is {found[name][1]}{found[name][0]}, expected "
      f"{wanted[name][1]}{wanted[name][0]}"
      for name in wanted if name in found and wanted[name] != found[name]]
  if problems:
    raise ValueError(f"{where} does not fit the model and optimizer: "
                     f"{'; '.join(problems)}")


def _shape_dtype(leaf) -> list:
  return [list(leaf.shape), str(leaf.dtype)]


def _text_crc32(about: dict) -> int:
  return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _first_line(error) -> str:
  """Of an error whose whole text may be a page."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300]
