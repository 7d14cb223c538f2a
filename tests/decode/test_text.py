"""Streams of text: nothing lost, nothing shown too early."""
from hypothesis import given, strategies as st
import pytest

from jaxlm.data.byte_tokenizer import ByteTokenizer
from jaxlm.decode.text import stream_text

TOKENIZER = ByteTokenizer()


def stream(text, cuts, stop_strings=()):
  ids = TOKENIZER.encode(text).tolist()
  edges = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
  chunks = [ids[a:b] for a, b in zip(edges, edges[1:])]
  return list(stream_text(chunks, TOKENIZER, stop_strings))


@given(text=st.text(alphabet="ab€漢 🙂\n", max_size=20),
       cuts=st.lists(st.integers(0, 80)))
def test_pieces_are_the_text_and_whole_characters(text, cuts):
  pieces = stream(text, cuts)
  assert "".join(pieces) == text
  assert not any("\ufffd" in piece for piece in pieces)


@given(text=st.text(alphabet="ab€", max_size=20),
       cuts=st.lists(st.integers(0, 60)),
       stops=st.lists(st.text(alphabet="ab€", min_size=1, max_size=4),
                      min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text, cuts, stops):
  found = [(text.find(stop) + len(stop), text.find(stop))
           for stop in stops if stop in text]
  _, end = min(found, default=(0, None))
  assert "".join(stream(text, cuts, stops)) == text[:end]


def test_what_cannot_be_a_stop_string_is_shown_at_once():
  pieces = stream("Hello<|e world", range(14), ["<|end|>"])
  assert pieces == [*"Hello", "<|e ", *"world"]


def test_bytes_that_are_no_character_are_shown_in_the_end():
  assert "".join(stream_text([[0xe2, 0x82]], TOKENIZER)) == "\ufffd"


def test_ids_that_the_tokenizer_does_not_know_are_no_text():
  assert "".join(stream_text([[72, 999], [105, 260]], TOKENIZER)) == "Hi"


def test_an_empty_stop_string_is_refused():
  with pytest.raises(ValueError, match="empty string"):
    list(stream_text([], TOKENIZER, [""]))
