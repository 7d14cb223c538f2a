"""Documents to rows of one length, with nothing lost and nothing mixed.

Each document is followed by `end_of_document`; the result is one stream, cut
every `seq_len` tokens. Row r reads stream positions r*T .. r*T + T - 1 and
predicts r*T + 1 .. r*T + T, so every token is an input once and a target once.
The stream alone is kept in memory; rows are cut when they are asked for.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """Packed rows.

  Attributes:
    stream: all tokens, [num_tokens], uint16 or int32.
    starts: stream position of each document's first token, rising.
    seq_len: T, the length of a row.
    end_of_document: the token after each document, and the padding.
    first_token: whether each row's first input is `end_of_document` in place
      of the text's own token, as GPT-2 begins with <|endoftext|>: a token that
      says nothing, where all queries find it. Targets stay what they are.
  """

  stream: np.ndarray
  starts: np.ndarray
  seq_len: int
  end_of_document: int
  first_token: bool = False

  def __len__(self) -> int:
    return -(-(len(self.stream) - 1) // self.seq_len)

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of everything that decides the rows' content."""
    digest = hashlib.sha256(f"{self.seq_len},{self.end_of_document}".encode())
    if self.first_token:
      digest.update(b",first_token")
    for array in (self.stream, self.starts):
      digest.update(str(array.dtype).encode())
      digest.update(array)
    return digest.hexdigest()[:16]

  def first(self, num_tokens: int) -> "Rows":
    """The rows of the first so many tokens, or of all if there are fewer."""
    if num_tokens < 2:
      raise ValueError(f"num_tokens={num_tokens} must be at least 2")
    return dataclasses.replace(
        self, stream=self.stream[:num_tokens],
        starts=self.starts[self.starts < num_tokens])

  def take(self, indices) -> Batch:
    """Rows by index.

    Returns:
      tokens, targets, segment_ids, int32, and mask, bool, each [B, T].
      segment_ids count a row's documents from 1; 0 is padding. mask is False
      where the target is another document's first token, or padding.
    """
    row_B = np.asarray(indices, np.int64).reshape(-1)
    if len(row_B) and not 0 <= row_B.min() <= row_B.max() < len(self):
      raise ValueError(
          f"row indices {row_B.min()}..{row_B.max()} reach outside the "
          f"{len(self)} rows"
      )
    position_BS = row_B[:, None] * self.seq_len + np.arange(self.seq_len + 1)
    real_BS = position_BS < len(self.stream)
    stream_BS = self.stream[np.minimum(position_BS, len(self.stream) - 1)]
    stream_BS = np.where(real_BS, stream_BS, self.end_of_document)
    stream_BS = stream_BS.astype(np.int32)
    tokens_BT, targets_BT = stream_BS[:, :-1], stream_BS[:, 1:]
    if self.first_token:
      tokens_BT[:, 0] = self.end_of_document
    document_BS = np.searchsorted(self.starts, position_BS, side="right")
    segment_BS = (document_BS - document_BS[:, :1] + 1) * real_BS
    same_BT = document_BS[:, 1:] == document_BS[:, :-1]
    return {
        "tokens": tokens_BT,
        "targets": targets_BT,
        "segment_ids": segment_BS[:, :-1].astype(np.int32),
        "mask": same_BT & real_BS[:, 1:],
    }

  def blank(self, count: int) -> Batch:
    """`count` rows of padding, to fill a batch up."""
    shape = (count, self.seq_len)
    return {
        "tokens": np.full(shape, self.end_of_document, np.int32),
        "targets": np.full(shape, self.end_of_document, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, bool),
    }


def pack(
    documents: Iterable[np.ndarray],
    seq_len: int,
    *,
    end_of_document: int,
    vocab_size: int,
    first_token: bool = False,
) -> Rows:
  """Packs tokenized documents (without end_of_document) into `Rows`."""
  if seq_len < 1:
    raise ValueError(f"seq_len={seq_len} must be at least 1")
  if not 0 <= end_of_document < vocab_size:
    raise ValueError(
        f"end_of_document={end_of_document} lies outside the vocabulary of "
        f"{vocab_size}"
    )
  dtype = np.uint16 if vocab_size <= 2**16 else np.int32
  end = np.asarray([end_of_document], dtype)
  parts, starts, num_tokens = [], [], 0
  for index, tokens in enumerate(documents):
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
      raise ValueError(
          f"document {index} has token ids {tokens.min()}..{tokens.max()}, "
          f"outside the vocabulary of {vocab_size}: the tokenizer and "
          "vocab_size do not belong together"
      )
    starts.append(num_tokens)
    num_tokens += len(tokens) + 1
    parts += [tokens.astype(dtype), end]
  if num_tokens < 2:
    raise ValueError("no tokens to pack: the documents are empty")
  return Rows(
      np.concatenate(parts), np.asarray(starts), seq_len, end_of_document,
      first_token,
  )
