"""A model whose routing is looked at: an ablation's arm, or a checkpoint."""
import dataclasses
import glob
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from experiments import results
from jaxlm import data
from jaxlm.config import ModelConfig
from jaxlm.config_dict import from_dict
from jaxlm.model.transformer import Execution
from jaxlm.train.checkpoint import newest, read_step

SEQ_LEN = 512  # of rows, for what was not trained here
DOCUMENTS = 8  # from so many files the tokens come


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """seq_len: of the rows it reads. beginning: tokens before each document.
  ablation: whether it was trained here; then load_curve is (tokens seen [S],
  load [S, L, E]) over training, if that was logged. where, text: in words.
  """
  name: str
  where: str
  text: str
  config: ModelConfig
  params: dict = dataclasses.field(repr=False)
  tokenizer: data.Tokenizer
  documents: list[data.Document] = dataclasses.field(repr=False)
  seq_len: int
  execution: Execution = Execution()
  beginning: tuple[int, ...] = ()
  ablation: bool = False
  load_curve: tuple[np.ndarray, np.ndarray] | None = None


def read(model, *, arm: str | None = None, seed: int | None = None,
         source: str | None = None, text: str | None = None,
         tokenizer: str | None = None) -> Subject:
  """Finds out what `model` is and loads it.

  Args:
    model: an ablation's workdir, or any checkpoint that `jaxlm.load` takes.
    arm, seed: of an ablation; the baseline and the first seed by default.
    source, text: what to read (`jaxlm.data.load_source`), or one file; by
      default an ablation's own held-out files, or python-stdlib.
    tokenizer: `jaxlm.data.load_tokenizer`'s, for a checkpoint without its own.

  Raises:
    ValueError: naming what is missing and the remedy.
  """
  if results.ablation_path(model).is_file():
    if tokenizer is not None:
      raise ValueError(f"--tokenizer {tokenizer}: an ablation's model has its "
                       "own; leave it out")
    return _of_ablation(pathlib.Path(model), arm, seed, source, text)
  if arm is not None or seed is not None:
    raise ValueError(f"{model} is no ablation's workdir, so it has no --arm "
                     "and no --seed: leave them out")
  return _of_checkpoint(model, source, text, tokenizer)


def _of_ablation(workdir, arm, seed, source, text) -> Subject:
  ablation = results.read_ablation(workdir)
  arm = ablation.baseline if arm is None else arm
  seed = ablation.seeds[0] if seed is None else seed
  arms = [a.name for a in ablation.arms]
  for what, value, there in (("arm", arm, arms),
                             ("seed", seed, list(ablation.seeds))):
    if value not in there:
      raise ValueError(f"--{what} {value}: {workdir} has {there}")
  directory = checkpoints(workdir, arm, seed)
  state, about = read_step(newest(directory))
  params = state["params"]
  if len(about["seeds"]) > 1:
    place = about["seeds"].index(seed)
    params = jax.tree.map(lambda x: x[place], params)
  options = json.loads((workdir / "config.json").read_text())
  options = {name: options[f"config.data.{name}"] for name in
             ("source", "tokenizer", "heldout_fraction", "max_bytes")}
  seq_len = ablation.train["seq_len"]
  heldout = None if text or source else options["heldout_fraction"]
  return Subject(
      f"{ablation.name}, arm {arm}", f"seed {seed}, step {about['step']}",
      _words(text, source, f"held-out files of {options['source']}"),
      from_dict(ModelConfig, about["model"]), params,
      _tokenizer(options, seq_len),
      documents(text, source or options["source"], heldout), seq_len,
      ablation=True, load_curve=load_curve(workdir, arm, seed))


def checkpoints(workdir, arm: str, seed: int) -> pathlib.Path:
  """Where a run's checkpoints are, of one seed or of several together.

  Raises:
    ValueError: they are not kept.
  """
  own = results.run_dir(workdir, arm, seed)
  together = [path for path in own.parent.glob("seeds_*")
              if str(seed) in path.name.split("_")[1:]]
  for path in (own, *together):
    if (path / "checkpoints").is_dir():
      return path / "checkpoints"
  raise ValueError(
      f"{own} has no checkpoints: an ablation removes them when it is done. "
      "Run it with --config.keep_checkpoints=True and another --workdir")


def load_curve(workdir, arm: str, seed: int):
  """(tokens [S], load [S, L, E]) of the lines of metrics that have `load`."""
  lines = [line for line in results.read_metrics(
      results.metrics_path(workdir, arm, seed)) if line.get("load")]
  if not lines:
    return None
  return (np.array([line["tokens"] for line in lines]),
          np.array([line["load"] for line in lines]))


def _tokenizer(options, seq_len):
  if not options["tokenizer"].startswith("bpe:"):
    return data.load_tokenizer(options["tokenizer"])
  options = {**options, "max_bytes": options["max_bytes"] or None}
  return data.build_dataset(**options, seq_len=seq_len).tokenizer


def _of_checkpoint(model, source, text, tokenizer) -> Subject:
  import jaxlm
  lm = jaxlm.load(
      model, "float32" if jax.default_backend() == "cpu" else "bfloat16")
  beginning: Sequence[int] = ()
  if tokenizer is not None:
    chosen = data.load_tokenizer(tokenizer)
  elif lm.tokenizer is not None:
    chosen, beginning = lm.tokenizer, lm.tokenizer.encode_prompt("")
  else:
    raise ValueError(
        f"{model} has no tokenizer: give the one it was trained with, such as "
        "--tokenizer json:PATH/tokenizer.json, --tokenizer tiktoken:o200k_base "
        "or --tokenizer bytes")
  context = lm.about.get("max_position_embeddings") or SEQ_LEN
  return Subject(
      pathlib.Path(model).name, "a checkpoint",
      _words(text, source, "python-stdlib"), lm.config, lm.params, chosen,
      documents(text, source or "python-stdlib"), min(context, SEQ_LEN),
      lm.execution, tuple(int(i) for i in beginning))


def _words(text, source, default) -> str:
  return pathlib.Path(text).name if text else source or default


def documents(text: str | None, source: str,
              heldout_fraction: float | None = None) -> list[data.Document]:
  """What to read: one file, or some of a source's, those held out if so."""
  if text is not None:
    if not pathlib.Path(text).is_file():
      raise ValueError(f"--text {text}: there is no such file")
    return data.load_source(f"files:{glob.escape(text)}")
  found = data.load_source(source)
  if heldout_fraction is not None:
    _, found = data.split_by_file(found, heldout_fraction)
  return data.sample(found, max_documents=DOCUMENTS)
