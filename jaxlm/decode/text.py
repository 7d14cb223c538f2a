"""Text from tokens while they come, up to a stop string."""
from collections.abc import Iterable, Iterator, Sequence
import typing


class Piece(typing.NamedTuple):
  """Some text of an answer; what is not "final" is thinking aloud."""
  channel: str
  text: str


# What decoders write for bytes that are no whole character yet.
INCOMPLETE = "\ufffd"


def stream_text(chunks: Iterable[Sequence[int]], tokenizer,
                stop_strings: Sequence[str] = ()) -> Iterator[str]:
  """The text of tokens that come in chunks, in pieces.

  Ends before the stop string that is complete first, of which nothing is shown:
  what may be the beginning of one is held back until that is settled.

  Ids past the tokenizer's vocabulary are no text: models may have more.

  Args:
    tokenizer: with `decode` and `vocab_size`.
  """
  if not all(stop_strings):
    raise ValueError(f"stop_strings={list(stop_strings)}: an empty string "
                     "would stop everything")
  held = ""
  for piece in _pieces(chunks, tokenizer):
    held += piece
    found = [(held.find(stop) + len(stop), held.find(stop))
             for stop in stop_strings if stop in held]
    if found:
      yield held[:min(found)[1]]
      return
    keep = max((_overlap(held, stop) for stop in stop_strings), default=0)
    if len(held) > keep:
      yield held[:len(held) - keep]
      held = held[len(held) - keep:]
  if held:
    yield held


def _pieces(chunks, tokenizer) -> Iterator[str]:
  """What each chunk adds to the text.

  A token's text depends on those before it (spaces, characters of several
  tokens), so that each chunk is decoded together with the one before.
  """
  decode, context, waiting = tokenizer.decode, [], []
  for chunk in chunks:
    waiting += [i for i in chunk if i < tokenizer.vocab_size]
    before, text = decode(context), decode(context + waiting)
    if text.endswith(INCOMPLETE):
      continue
    yield text[len(before):]
    context, waiting = waiting, []
  if waiting:
    yield decode(context + waiting)[len(decode(context)):]


def _overlap(text: str, stop: str) -> int:
  """The length of the longest end of `text` that begins `stop`."""
  return next(n for n in range(min(len(text), len(stop) - 1), -1, -1)
              if text.endswith(stop[:n]))
