"""What a tokenizer is, and the simplest one.

Encoding never adds special tokens and never reads them from the text: a file
that contains "<|endoftext|>" is encoded letter by letter.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import tokenizers


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

  def to_json(self) -> str | None:
    """The same as the text of a tokenizer.json, if it can be said as one."""


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

  def to_json(self) -> str:
    letters = {letter: i for i, letter in enumerate(_byte_letters())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer.to_str()


def _byte_letters() -> list[str]:
  """The letter that stands for each byte in byte-level vocabularies (GPT-2)."""
  shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
  ids = np.asarray(ids).reshape(-1)
  if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
    raise ValueError(
        f"token ids {ids.min()}..{ids.max()} reach outside the vocabulary of "
        f"{vocab_size}: is this the tokenizer that the model was trained with?"
    )
  return [int(i) for i in ids]
