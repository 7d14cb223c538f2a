"""The formats by name: which one a path is in, reading and writing it."""
import pathlib
from collections.abc import Callable

from jaxlm.convert import (files, gguf, huggingface, native, openai,
                           training)
from jaxlm.convert.checkpoint import Checkpoint

# Each recognizes(path), and reads and writes a checkpoint.
FORMATS = {"native": native, "hf": huggingface, "openai": openai}
_READ_ONLY = {"gguf": gguf, "training": training}


def format_of(path) -> str:
  """The name of the format that a path is in.

  Raises:
    ValueError: it is in none.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise ValueError(f"{path} does not exist")
  for name, module in (FORMATS | _READ_ONLY).items():
    if module.recognizes(path):
      return name
  raise ValueError(
      f"{path} is no checkpoint: expected a directory with a config.json and "
      "*.safetensors (Hugging Face's or OpenAI's layout) or with what "
      "jaxlm.save wrote, a GGUF file, or the workdir of a training run")


def read(path) -> Checkpoint:
  """The checkpoint at a path, its tensors not read yet.

  Raises:
    ValueError: it is none, or damaged, or does not fit its config.
    NotImplementedError: its config asks for what is not supported.
  """
  path = pathlib.Path(path).expanduser()
  return (FORMATS | _READ_ONLY)[format_of(path)].read(path)


def write(checkpoint: Checkpoint, path, format: str = "native",
          progress: Callable[[int], None] = lambda nbytes: None) -> None:
  """Writes a checkpoint tensor by tensor; it appears whole or not at all.

  Args:
    progress: called with bytes as they have been written.

  Raises:
    ValueError: the format is unknown or has no place for this model, or the
      path is taken or cannot be written.
  """
  if format not in FORMATS:
    raise ValueError(f"format={format!r}: use one of {tuple(FORMATS)}")
  with files.new_directory(path, checkpoint.nbytes) as directory:
    FORMATS[format].write(checkpoint, directory, progress)
    for name, content in checkpoint.files.items():
      (directory / name).write_bytes(content)
