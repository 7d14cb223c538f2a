"""Directories that appear whole or not at all, and the files in them."""
import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

# What a model's text goes through, carried along as it is.
TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "chat_template.json", "generation_config.json")


def text_files(directory: pathlib.Path) -> dict[str, bytes]:
  return {name: (directory / name).read_bytes() for name in TEXT_FILES
          if (directory / name).is_file()}


def read_json(path: pathlib.Path) -> dict:
  """A file that holds one JSON object.

  Raises:
    ValueError: it cannot be read as that.
  """
  try:
    values = json.loads(path.read_bytes())
  except FileNotFoundError as error:
    raise ValueError(f"{path} does not exist") from error
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{path} cannot be read as JSON: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} holds a {type(values).__name__}, expected a JSON "
                     "object")
  return values


def write_json(path: pathlib.Path, values: dict) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def new_directory(path, nbytes: int) -> Iterator[pathlib.Path]:
  """A directory to fill, which gets its name when that has worked.

  Until then it lies beside it under a temporary name; if anything fails it is
  removed and nothing has changed.

  Args:
    nbytes: about what will be written, for which there must be space.

  Raises:
    ValueError: something is there already, or it cannot be written.
  """
  path = pathlib.Path(path).expanduser().absolute()
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise ValueError(f"{path} exists already: choose another name, or remove "
                     "it first")
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:
      raise ValueError(f"{path} needs {nbytes / 1e9:.1f} GB, but its disk has "
                       f"{free / 1e9:.1f} GB free: choose another disk")
    temporary = pathlib.Path(tempfile.mkdtemp(
        prefix=f".{path.name}-unfinished-", dir=path.parent))
    yield temporary
    temporary.chmod(0o777 & ~_umask())
    os.rename(temporary, path)
    temporary = None
  except OSError as error:
    raise ValueError(f"{path} cannot be written: {error}. Nothing was left "
                     "behind") from error
  finally:
    if temporary is not None:
      shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
