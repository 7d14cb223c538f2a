"""Checkpoints that are whole, of this run, and as they were written.

Orbax writes them, in the background and atomically. It cannot tell a flipped
bit, so a fingerprint of every leaf is kept beside them.
"""
import json
import pathlib
import warnings
import zlib

from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp


class CheckpointError(ValueError):
  """A checkpoint cannot be written, or none of those there can be read."""


class Checkpoints:
  """The newest `keep` checkpoints of a run, DIRECTORY/STEP.

  Each has the leaves of a pytree and `about`, a JSON-able dict.
  """

  def __init__(self, directory, keep: int):
    self._directory = pathlib.Path(directory).absolute()
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
          self._directory, options=ocp.CheckpointManagerOptions(
              max_to_keep=keep, cleanup_tmp_directories=True))
    except OSError as error:
      raise self._unwritable(error) from error

  def save(self, step: int, state, about: dict) -> None:
    """Begins to save; `state` may be donated when this returns.

    Raises:
      FloatingPointError: a leaf is not finite; nothing is saved.
      CheckpointError: this or the previous checkpoint cannot be written.
    """
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
      # The sum needs no second array; it is finite only if all entries are.
      if not np.isfinite(np.sum(np.asarray(leaf))):
        raise FloatingPointError(f"{name} is not finite")
    about = {**about, "step": step, "leaves": {
        name: [*_shape_dtype(leaf), _fingerprint(leaf)]
        for name, leaf in leaves.items()}}
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
    for step in sorted(self._manager.all_steps(), reverse=True):
      where = self._directory / str(step)
      try:
        about = self._read_about(step)
      except Exception as error:  # whatever orbax makes of damaged files
        damaged[step] = _first_line(error)
        continue
      check_same(where, about, expected)
      check_leaves(where, about["leaves"], abstract)
      try:
        state = self._read_state(step, about, abstract)
      except Exception as error:
        damaged[step] = _first_line(error)
        continue
      self._move_aside(damaged, step)
      return state, about
    if damaged:
      raise CheckpointError(
          f"{self._directory}: no checkpoint can be read, "
          + "; ".join(f"{step}: {why}" for step, why in damaged.items())
          + ". Put back a copy, or move the directory away to begin anew")
    return None

  def _read_about(self, step: int) -> dict:
    about = self._manager.restore(step, args=ocp.args.Composite(
        about=ocp.args.JsonRestore()))["about"]
    if about.pop("crc32") != _text_crc32(about):
      raise ValueError("its description is damaged")
    return about

  def _read_state(self, step: int, about: dict, abstract):
    tree = traverse_util.unflatten_dict(named_leaves(abstract), sep="/")
    tree = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(tree)))["state"]
    leaves = traverse_util.flatten_dict(tree, sep="/")
    wrong = [name for name, (*_, saved) in about["leaves"].items()
             if _fingerprint(leaves[name]) != saved]
    if wrong:
      raise ValueError(f"not as it was saved: {', '.join(wrong)}")
    return jax.tree.unflatten(jax.tree.structure(abstract),
                              [leaves[name] for name in named_leaves(abstract)])

  def _move_aside(self, damaged: dict[int, str], good: int) -> None:
    for step, why in damaged.items():
      aside = self._directory.with_name(f"{self._directory.name}-damaged")
      aside.mkdir(exist_ok=True)
      number = len(list(aside.iterdir()))
      target = aside / f"{step}-{number}"
      (self._directory / str(step)).rename(target)
      warnings.warn(f"the checkpoint of step {step} is damaged ({why}): moved "
                    f"to {target}; going on from step {good}", RuntimeWarning)
    if damaged:
      self._manager.reload()


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


def _fingerprint(leaf) -> int:
  return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))


def _text_crc32(about: dict) -> int:
  return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _first_line(error) -> str:
  """Of an error whose whole text may be a page."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300]
