"""What tokens are of a text: its letters, and the kind of thing they spell."""
import io
import keyword
import re
import token as token_types
import tokenize
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Of Python, by the standard library's own tokenizer; and of any other text.
PYTHON = ("whitespace", "identifier", "keyword", "number", "operator",
          "string", "comment", "special")
PROSE = ("whitespace", "word", "number", "punctuation", "special")

INCOMPLETE = "\ufffd"  # what decoders write for a part of a character
_LONGEST = 4  # bytes of a character


class Piece(NamedTuple):
  """Some text and the tokens it is of: one, or those of one character."""
  text: str
  start: int
  stop: int


def pieces(tokenizer, ids: Sequence[int]) -> list[Piece]:
  """The text of each token; tokens that are a part of a character together.

  A token's text depends on those before it (spaces), so that each is decoded
  together with the piece before.
  """
  found, ids = [], [int(i) for i in ids]
  context, before, start = [], "", 0
  for stop in range(1, len(ids) + 1):
    text = tokenizer.decode(context + ids[start:stop])[len(before):]
    if (text.endswith(INCOMPLETE) and stop - start < _LONGEST
        and stop < len(ids)):
      continue
    found.append(Piece(text, start, stop))
    context, start = ids[start:stop], stop
    before = tokenizer.decode(context)
  return found


def kinds_of_text(text: str, python: bool) -> np.ndarray:
  """The kind of each character, as its place in PYTHON or PROSE.

  Python that cannot be read to its end is of kinds as far as it can be; what
  follows is told by its letters alone.
  """
  if python:
    return _kinds_of_python(text)
  return _kinds_by_letters(text, PROSE, {"word": "word",
                                         "other": "punctuation"})


def kinds_of_tokens(found: Sequence[Piece], document: str,
                    python: bool) -> np.ndarray:
  """The kind of each token: that of its first letter that is no space.

  Args:
    document: the whole text that the pieces begin, so that what is cut in the
      middle is still known for what it is.
  """
  text = "".join(piece.text for piece in found)
  if document.startswith(text.rstrip(INCOMPLETE)):
    text = document
  of_letters = kinds_of_text(text, python)
  kinds, place = [], 0
  for piece_text, start, stop in found:
    blank = len(piece_text) - len(piece_text.lstrip())
    first = place + (blank if blank < len(piece_text) else 0)
    kind = of_letters[first] if piece_text and first < len(of_letters) else 0
    kinds += [kind] * (stop - start)
    place += len(piece_text)
  return np.array(kinds, np.int32)


_BY_LETTERS = re.compile(
    r"(?P<whitespace>\s+)|(?P<number>\d[\w.]*)|(?P<word>[^\W\d]\w*)"
    r"|(?P<other>.)", re.DOTALL)


def _kinds_by_letters(text, names, renamed) -> np.ndarray:
  kinds = np.zeros(len(text), np.int32)
  for match in _BY_LETTERS.finditer(text):
    name = renamed.get(match.lastgroup, match.lastgroup)
    kinds[match.start():match.end()] = names.index(name)
  return kinds


def _kinds_of_python(text) -> np.ndarray:
  kinds = _kinds_by_letters(text, PYTHON, {"word": "identifier",
                                           "other": "operator"})
  starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))])
  try:
    for item in tokenize.generate_tokens(io.StringIO(text).readline):
      name = _python_kind(item)
      if name is not None:
        begin, end = (min(starts[row - 1] + column, len(text))
                      for row, column in (item.start, item.end))
        kinds[begin:end] = PYTHON.index(name)
  except (tokenize.TokenError, SyntaxError):
    pass  # a text that was cut, or is not quite Python
  return kinds


def _python_kind(item) -> str | None:
  kind = token_types.tok_name[item.type]
  if kind == "NAME":
    return "keyword" if keyword.iskeyword(item.string) else "identifier"
  if kind.startswith(("FSTRING", "TSTRING")):
    return "string"
  return {"NUMBER": "number", "OP": "operator", "STRING": "string",
          "COMMENT": "comment"}.get(kind)
