"""Where text comes from.

A source is a list of `Document`s in a fixed order. Empty documents are left
out; a source with nothing left is an error.
"""

import glob
import itertools
import json
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator

from jaxlm.data.documents import Document


def load_source(
    spec: str, *, text_field: str = "text", max_documents: int | None = None
) -> list[Document]:
  """Documents of `spec`.

  Args:
    spec: `python-stdlib`, `files:GLOB` or `hf:NAME[:SPLIT[:CONFIG]]`.
    text_field: field or column with the text (.jsonl, .parquet, hf).
    max_documents: how many documents of an `hf:` source to download; other
      sources are read whole, and `sample` chooses from them.

  Raises:
    ValueError: unknown spec, or data that is missing, empty or unreadable.
  """
  kind, _, rest = spec.partition(":")
  if spec == "python-stdlib":
    return python_stdlib()
  if kind == "files" and rest:
    return local_files(rest, text_field)
  if kind == "hf" and rest:
    name, split, config = (rest.split(":", 2) + ["", ""])[:3]
    return huggingface(
        name,
        split or "train",
        text_field,
        config=config or None,
        max_documents=max_documents,
    )
  raise ValueError(
      f"source={spec!r} is not known: use 'python-stdlib', 'files:GLOB' or "
      "'hf:NAME[:SPLIT[:CONFIG]]'"
  )


def python_stdlib() -> list[Document]:
  """Source files of the running interpreter's standard library.

  Files that are not UTF-8 (a few in the test directories, on purpose) are
  skipped, and so are installed packages.
  """
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  skipped = {"site-packages", "dist-packages", "__pycache__"}
  documents = []
  for path in sorted(root.rglob("*.py")):
    name = path.relative_to(root)
    if skipped.isdisjoint(name.parts) and path.is_file():
      try:
        text = path.read_bytes().decode("utf-8")
      except UnicodeDecodeError:
        continue
      documents.append(Document(name.as_posix(), text))
  remedy = "install the interpreter's library, or use source='files:GLOB'"
  return _nonempty(documents, f"{root} (source='python-stdlib')", remedy)


def local_files(pattern: str, text_field: str = "text") -> list[Document]:
  """Documents of the files that match a glob (`**` reaches subfolders).

  A .jsonl line or a .parquet row is a document, whose text is `text_field`;
  any other file is one document of UTF-8 text. Names are relative to the
  part of the pattern without wildcards, so a moved folder splits as before.
  """
  pattern = os.path.expanduser(pattern)
  paths = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
  if not paths:
    raise ValueError(
        f"files:{pattern} matches no file (working directory {os.getcwd()}): "
        "check the path, and quote the pattern in a shell"
    )
  fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
  root = os.path.dirname(fixed) or "."
  documents: list[Document] = []
  for path in sorted(paths):
    name = pathlib.Path(os.path.relpath(path, root)).as_posix()
    try:
      if path.endswith(".jsonl"):
        documents.extend(_read_jsonl(path, name, text_field))
      elif path.endswith(".parquet"):
        documents.extend(_read_parquet(path, name, text_field))
      else:
        text = pathlib.Path(path).read_bytes().decode("utf-8")
        documents.append(Document(name, text))
    except UnicodeDecodeError as error:
      raise ValueError(
          f"{path}: byte {error.start} is not UTF-8: convert the file or "
          "narrow the pattern"
      ) from error
    except OSError as error:
      raise ValueError(
          f"{path}: cannot be read ({error}): check the file and its "
          "permissions, or narrow the pattern"
      ) from error
  return _nonempty(documents, f"files:{pattern}", "add text to the files")


def huggingface(
    name: str,
    split: str = "train",
    text_field: str = "text",
    *,
    config: str | None = None,
    max_documents: int | None = None,
) -> list[Document]:
  """Documents of a Hugging Face dataset.

  With `max_documents` the rows are streamed and only the first so many are
  downloaded.
  """
  where = f"hf:{name}:{split}" + (f":{config}" if config else "")
  try:
    import datasets
  except ImportError as error:
    raise ValueError(
        f"{where} needs the 'datasets' package: pip install datasets"
    ) from error
  try:
    rows = datasets.load_dataset(
        name, config, split=split, streaming=max_documents is not None
    )
    documents = []
    for i, row in enumerate(itertools.islice(rows, max_documents)):
      text = _field(row, text_field, f"{where} row {i}")
      documents.append(Document(f"{name}/{split}/{i}", text))
  except _BadRecord:
    raise
  except Exception as error:  # network, hub and script errors share no base
    raise ValueError(
        f"{where} cannot be loaded ({type(error).__name__}: {error}): check "
        "the name, the split, the configuration and the network, or use "
        "source='python-stdlib', which needs none"
    ) from error
  return _nonempty(documents, where, "choose another split or text_field")


class _BadRecord(ValueError):
  """A record whose message already names the file and the remedy."""


def _read_jsonl(path: str, name: str, text_field: str) -> Iterator[Document]:
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      where = f"{path}:{number}"
      try:
        row = json.loads(line)
      except json.JSONDecodeError as error:
        raise _BadRecord(
            f"{where}: not a JSON value ({error}): correct or remove the line"
        ) from error
      yield Document(f"{name}:{number}", _field(row, text_field, where))


def _read_parquet(path: str, name: str, text_field: str) -> Iterator[Document]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise _BadRecord(
        f"{path}: parquet files need the 'pyarrow' package: pip install "
        "pyarrow"
    ) from error
  try:
    file = pyarrow.parquet.ParquetFile(path)
    columns = file.schema_arrow.names
    # A missing column is reported by _field, with the names that exist.
    wanted = [text_field] if text_field in columns else None
    number = 0
    for batch in file.iter_batches(columns=wanted):
      for row in batch.to_pylist():
        text = _field(row, text_field, f"{path} row {number}")
        yield Document(f"{name}:{number}", text)
        number += 1
  except pyarrow.ArrowException as error:
    raise _BadRecord(
        f"{path}: not a readable parquet file ({error}): replace it or narrow "
        "the pattern"
    ) from error


def _field(row, text_field: str, where: str) -> str:
  """The text of a record; a null counts as empty."""
  if not isinstance(row, dict) or text_field not in row:
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise _BadRecord(
        f"{where}: no field {text_field!r}, found {found}: pass text_field"
    )
  text = row[text_field]
  if text is None:
    return ""
  if not isinstance(text, str):
    raise _BadRecord(
        f"{where}: field {text_field!r} is a {type(text).__name__}, not a "
        "string: pass the text_field that holds the text"
    )
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise _BadRecord(
        f"{where}: field {text_field!r} has a lone surrogate at character "
        f"{error.start}: remove it"
    ) from error
  return text


def _nonempty(
    documents: Iterable[Document], where: str, remedy: str
) -> list[Document]:
  result = [document for document in documents if document.text]
  if not result:
    raise ValueError(f"{where}: no text found: {remedy}")
  return result
