"""A source, split, tokenized and packed."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from jaxlm.data import documents as documents_lib
from jaxlm.data import fim as fim_lib
from jaxlm.data import packing
from jaxlm.data import sources
from jaxlm.data import tokenizers


@dataclasses.dataclass(frozen=True)
class DataBundle:
  """A tokenizer, packed rows to train on and rows never trained on.

  `description` is JSON-able: what the data is, for reports.
  """

  tokenizer: tokenizers.Tokenizer
  train: packing.Rows
  heldout: packing.Rows
  description: dict[str, Any]


def build_dataset(
    source: str = "python-stdlib",
    tokenizer: str = "bytes",
    seq_len: int = 512,
    *,
    heldout_fraction: float = 0.05,
    fim_rate: float = 0.0,
    first_token: bool = False,
    seed: int = 0,
    max_documents: int | None = None,
    max_bytes: int | None = None,
    text_field: str = "text",
) -> DataBundle:
  """Loads, splits, tokenizes and packs a source.

  Args:
    source: see `load_source`.
    tokenizer: see `load_tokenizer`; `bpe:` trains on the training part.
    seq_len: T, the length of a row.
    heldout_fraction: share of the files that is held out.
    fim_rate: share of the training documents made into fill-in-the-middle;
      held-out documents never are, so that losses stay comparable.
    first_token: each row, held-out ones too, begins with the input
      `end_of_document` in place of its own first token.
    seed: of the split and the fill-in-the-middle cuts, not of the order.
    max_documents: documents at most; each part gets its share.
    max_bytes: bytes of text at most; each part gets its share.
    text_field: field or column with the text (.jsonl, .parquet, hf).

  Raises:
    ValueError: naming the argument or the file, and the remedy.
  """
  documents = sources.load_source(
      source, text_field=text_field, max_documents=max_documents
  )
  # Splitting first keeps a file on its side whatever the budget.
  split = documents_lib.split_by_file(documents, heldout_fraction, seed)
  shares = (1 - heldout_fraction, heldout_fraction)
  train, heldout = (
      documents_lib.sample(
          part,
          max_documents=_share("max_documents", max_documents, share),
          max_bytes=_share("max_bytes", max_bytes, share),
      )
      for part, share in zip(split, shares)
  )
  loaded = tokenizers.load_tokenizer(tokenizer, train)

  def packed(part, rate):
    tokens = (loaded.encode(document.text) for document in part)
    return packing.pack(
        fim_lib.apply_fim(tokens, loaded.fim, rate, seed),
        seq_len,
        end_of_document=loaded.end_of_document,
        vocab_size=loaded.vocab_size,
        first_token=first_token,
    )

  train_rows, heldout_rows = packed(train, fim_rate), packed(heldout, 0.0)
  description = {
      "source": source,
      "tokenizer": tokenizer,
      "vocab_size": loaded.vocab_size,
      "seq_len": seq_len,
      "heldout_fraction": heldout_fraction,
      "fim_rate": fim_rate,
      "first_token": first_token,
      "seed": seed,
      "content_hash": _content_hash(train + heldout),
      "train": _describe(train, train_rows),
      "heldout": _describe(heldout, heldout_rows),
  }
  return DataBundle(loaded, train_rows, heldout_rows, description)


def _share(name: str, limit: int | None, share: float) -> int | None:
  if limit is None:
    return None
  if limit < 1:
    raise ValueError(f"{name}={limit} must be at least 1")
  return max(1, round(limit * share))


def _describe(
    documents: Sequence[documents_lib.Document], rows: packing.Rows
) -> dict[str, int]:
  return {
      "files": len(documents),
      "bytes": sum(document.num_bytes for document in documents),
      "tokens": len(rows.stream),
      "rows": len(rows),
  }


def _content_hash(documents: Sequence[documents_lib.Document]) -> str:
  digest = hashlib.sha256()
  for document in documents:
    for part in (document.name, document.text):
      encoded = part.encode("utf-8", "surrogateescape")
      digest.update(len(encoded).to_bytes(8, "big"))
      digest.update(encoded)
  return digest.hexdigest()[:16]
