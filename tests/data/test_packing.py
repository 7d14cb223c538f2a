import dataclasses

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxlm import data

END = 256
DOCUMENTS = st.lists(
    st.lists(st.integers(0, 255), min_size=1, max_size=30),
    min_size=1,
    max_size=8,
)


def pack(documents, seq_len, vocab_size=260, **options):
  arrays = [np.asarray(d, np.int32) for d in documents]
  return data.pack(
      arrays, seq_len, end_of_document=END, vocab_size=vocab_size, **options
  )


def one_token_at_a_time(documents, seq_len):
  """The rows, written the slow and obvious way."""
  stream = [
      (token, number)
      for number, document in enumerate(documents)
      for token in [*document, END]
  ]
  rows = []
  for first in range(0, len(stream) - 1, seq_len):
    row = {"tokens": [], "targets": [], "segment_ids": [], "mask": []}
    for i in range(first, first + seq_len):
      here = stream[i] if i < len(stream) else (END, None)
      there = stream[i + 1] if i + 1 < len(stream) else (END, None)
      row["tokens"].append(here[0])
      row["targets"].append(there[0])
      in_row = None if here[1] is None else here[1] - stream[first][1]
      row["segment_ids"].append(0 if in_row is None else in_row + 1)
      row["mask"].append(there[1] is not None and here[1] == there[1])
    rows.append(row)
  return {k: np.array([row[k] for row in rows]) for k in rows[0]}


@hypothesis.given(DOCUMENTS, st.integers(1, 17), st.sampled_from([260, 70001]))
def test_rows_are_the_obvious_ones(documents, seq_len, vocab_size):
  rows = pack(documents, seq_len, vocab_size)
  batch = rows.take(np.arange(len(rows)))
  expected = one_token_at_a_time(documents, seq_len)
  for name, array in batch.items():
    np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert array.dtype == (bool if name == "mask" else np.int32)
    assert array.shape == (len(rows), seq_len)


@hypothesis.given(DOCUMENTS, st.integers(1, 17))
def test_every_token_is_an_input_once_and_a_target_once(documents, seq_len):
  batch = (rows := pack(documents, seq_len)).take(range(len(rows)))
  # A document's first token has nothing to be predicted from.
  targets = batch["targets"][batch["mask"]].tolist()
  assert targets == [t for d in documents for t in [*d[1:], END]]
  inputs = batch["tokens"][batch["segment_ids"] > 0].tolist()
  stream = [t for d in documents for t in [*d, END]]
  assert inputs in (stream, stream[:-1])


def test_any_rows_in_any_order():
  rows = pack([[1, 2, 3], [4], [5, 6, 7, 8, 9]], 3)
  whole = rows.take(range(len(rows)))
  some = rows.take([3, 0, 3])
  for name in whole:
    np.testing.assert_array_equal(some[name], whole[name][[3, 0, 3]])
  for bad in ([4], [-1], [0, 99]):
    with pytest.raises(ValueError, match="outside the 4 rows"):
      rows.take(bad)


def test_a_first_token_hides_one_input_of_each_row():
  documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
  plain, first = pack(documents, 3), pack(documents, 3, first_token=True)
  expected, found = (rows.take(range(len(rows))) for rows in (plain, first))
  assert found["tokens"][:, 0].tolist() == [END] * 4
  np.testing.assert_array_equal(found["tokens"][:, 1:],
                                expected["tokens"][:, 1:])
  for name in ("targets", "segment_ids", "mask"):
    np.testing.assert_array_equal(found[name], expected[name])
  for name, array in plain.blank(2).items():
    np.testing.assert_array_equal(first.blank(2)[name], array)


def test_the_same_stream_in_rows_of_another_length():
  documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
  rows = pack(documents, 3, first_token=True)
  before = rows.fingerprint
  longer = dataclasses.replace(rows, seq_len=7)
  expected = pack(documents, 7, first_token=True)
  assert len(longer) == len(expected) == 2
  assert longer.fingerprint == expected.fingerprint != before
  assert longer.stream is rows.stream
  for name, array in longer.take([0, 1]).items():
    np.testing.assert_array_equal(array, expected.take([0, 1])[name])


def test_memory_is_two_bytes_a_token_when_the_vocabulary_allows():
  assert pack([[1, 2, 3]], 2, 65536).stream.dtype == np.uint16
  assert pack([[1, 2, 3]], 2, 65537).stream.dtype == np.int32
  rows = data.pack(
      [np.array([70000])], 1, end_of_document=70001, vocab_size=70002
  )
  assert rows.take([0])["tokens"].item() == 70000


def test_fingerprint_tells_rows_apart():
  variants = [
      pack([[1, 2, 3]], 2),
      pack([[1, 2, 4]], 2),
      pack([[1, 2, 3]], 3),
      pack([[1, 2, END, 3]], 2),
      pack([[1, 2], [3]], 2),
      pack([[1, 2, 3]], 2, first_token=True),
  ]
  assert len({rows.fingerprint for rows in variants}) == len(variants)
  assert pack([[1, 2, 3]], 2).fingerprint == variants[0].fingerprint
  # Checkpoints hold it, so what it is of these rows may not change.
  assert variants[0].fingerprint == "4264fc84dc710768"


def test_bad_input():
  with pytest.raises(ValueError, match="seq_len=0"):
    pack([[1]], 0)
  with pytest.raises(ValueError, match="document 1 has token ids 7..260"):
    pack([[1], [7, 260]], 4)
  with pytest.raises(ValueError, match="document 0 has token ids -1"):
    pack([[-1]], 4)
  with pytest.raises(ValueError, match="end_of_document=256 lies outside"):
    pack([[1]], 4, vocab_size=256)
  with pytest.raises(ValueError, match="no tokens"):
    pack([], 4)
