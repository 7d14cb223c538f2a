"""What a tokenizer is, and the simplest one.

Encoding never adds special tokens and never reads them from the text: a file
that contains "<|endoftext|>" is encoded letter by letter.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class FimTokens(NamedTuple):
  """Ids that mark the parts of a fill-in-the-middle document."""

  prefix: int
  middle: int
  suffix: int


class Tokenizer(Protocol):
  """What the data pipeline and generation need of a tokenizer."""

  vocab_size: int
  end_of_document: int
  fim: FimTokens | None

  def encode(self, text: str) -> np.ndarray:
    """Token ids, int32 [n]."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text; special tokens are written by their names."""

  def token_bytes(self) -> np.ndarray:
    """UTF-8 bytes each token stands for, int32 [vocab_size]; special: 0."""


END_OF_DOCUMENT = "<|end_of_document|>"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
SPECIAL = (END_OF_DOCUMENT, *FIM)


class ByteTokenizer:
  """UTF-8 bytes, then end_of_document and the three FIM tokens."""

  vocab_size = 256 + len(SPECIAL)
  end_of_document = 256
  fim = FimTokens(257, 258, 259)

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    pieces = [bytes([i]) for i in range(256)]
    pieces += [name.encode() for name in SPECIAL]
    ids = check_ids(ids, self.vocab_size)
    return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")

  def token_bytes(self) -> np.ndarray:
    return (np.arange(self.vocab_size) < 256).astype(np.int32)


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
  ids = np.asarray(ids).reshape(-1)
  if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
    raise ValueError(
        f"token ids {ids.min()}..{ids.max()} reach outside the vocabulary of "
        f"{vocab_size}: is this the tokenizer that the model was trained with?"
    )
  return [int(i) for i in ids]
