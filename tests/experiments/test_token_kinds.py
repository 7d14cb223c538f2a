"""Tokens as text, and what kind of thing each spells."""
import pytest

from experiments import token_kinds
from jaxlm.data import ByteTokenizer, Document, train_bpe

PYTHON = '''\
def f(x):  # half
\treturn "a\\n" + 0.5 * x
'''


def spelled(text, python):
  """The text in runs of one kind, blanks left out."""
  names = token_kinds.PYTHON if python else token_kinds.PROSE
  runs = []
  for letter, kind in zip(text, token_kinds.kinds_of_text(text, python)):
    name = names[kind]
    if runs and runs[-1][1] == name:
      runs[-1][0] += letter
    else:
      runs.append([letter, name])
  return [tuple(run) for run in runs if run[1] != "whitespace"]


def test_python_is_told_by_its_own_tokenizer():
  assert spelled(PYTHON, True) == [
      ("def", "keyword"), ("f", "identifier"), ("(", "operator"),
      ("x", "identifier"), ("):", "operator"), ("# half", "comment"),
      ("return", "keyword"), ('"a\\n"', "string"), ("+", "operator"),
      ("0.5", "number"), ("*", "operator"), ("x", "identifier")]


def test_several_lines_and_letters_beyond_ascii():
  text = 'é = """eins\nzwei é"""\nif é: pass\n'
  assert spelled(text, True) == [
      ("é", "identifier"), ("=", "operator"), ('"""eins\nzwei é"""', "string"),
      ("if", "keyword"), ("é", "identifier"), (":", "operator"),
      ("pass", "keyword")]


@pytest.mark.parametrize("text", ["if x:\n\"\"\"never closed", "x = (1,\n",
                                  "\tx\n y\n", "?$\0", ""])
def test_what_is_no_python_is_told_by_its_letters(text):
  assert len(token_kinds.kinds_of_text(text, True)) == len(text)


def test_prose():
  assert spelled("It's 3.5 m, Zoë.", False) == [
      ("It", "word"), ("'", "punctuation"), ("s", "word"), ("3.5", "number"),
      ("m", "word"), (",", "punctuation"), ("Zoë", "word"),
      (".", "punctuation")]


def test_bytes_of_a_character_are_one_piece():
  text = "aé\u20ac\U0001f600b\ufffd"
  found = token_kinds.pieces(ByteTokenizer(), ByteTokenizer().encode(text))
  assert [piece.text for piece in found] == list(text)
  assert [piece.stop - piece.start for piece in found] == [1, 2, 3, 4, 1, 3]
  # A character that is cut, and bytes that are none.
  found = token_kinds.pieces(ByteTokenizer(), [0xe2, 0x82])
  assert [(piece.start, piece.stop) for piece in found] == [(0, 2)]
  found = token_kinds.pieces(ByteTokenizer(), [0xff] * 5 + [97])
  assert sum(piece.stop - piece.start for piece in found) == 6
  assert found[-1].text.endswith("a")


def test_pieces_of_a_trained_vocabulary_are_the_text(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXLM_CACHE", str(tmp_path))
  tokenizer = train_bpe([Document("a", PYTHON * 3)], 290)
  text = PYTHON + "# \U0001f600é\n"
  found = token_kinds.pieces(tokenizer, tokenizer.encode(text))
  assert "".join(piece.text for piece in found) == text
  kinds = token_kinds.kinds_of_tokens(found, text, True)
  assert len(kinds) == len(tokenizer.encode(text))
  # A token with a blank in front is of the kind of what follows.
  by_text = {piece.text: token_kinds.PYTHON[kinds[piece.start]]
             for piece in found}
  assert by_text[" x"] == "identifier" and by_text["\n"] == "whitespace"


def test_what_is_cut_in_a_string_is_still_a_string():
  whole = 'x = """one two\nthree"""\n'
  ids = ByteTokenizer().encode(whole[:11])
  found = token_kinds.pieces(ByteTokenizer(), ids)
  kinds = token_kinds.kinds_of_tokens(found, whole, True)
  assert {token_kinds.PYTHON[kind] for kind in kinds[4:10]} == {"string"}
  alone = token_kinds.kinds_of_tokens(found, "other text", True)
  assert "identifier" in {token_kinds.PYTHON[kind] for kind in alone[4:10]}
