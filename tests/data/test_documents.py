import hypothesis
from hypothesis import strategies as st
import pytest

from jaxlm import data

NAMES = st.sets(st.text(min_size=1, max_size=8), min_size=60, max_size=90)


def documents(names, size=11):
  return [data.Document(name, "x" * size) for name in sorted(names)]


@hypothesis.given(NAMES, st.integers(0, 2**32))
@hypothesis.settings(max_examples=30, deadline=None)
def test_a_split_moves_nothing_when_files_come_or_go(names, seed):
  whole = documents(names)
  train, heldout = data.split_by_file(whole, 0.5, seed)
  assert sorted(train + heldout, key=lambda d: d.name) == whole
  some = whole[::3]
  try:
    fewer, fewer_heldout = data.split_by_file(some, 0.5, seed)
  except ValueError:
    return  # all of the few on one side
  assert set(fewer) <= set(train) and set(fewer_heldout) <= set(heldout)


def test_split_fraction_and_seed():
  whole = documents(map(str, range(4000)))
  _, heldout = data.split_by_file(whole, 0.05, 0)
  # Five standard deviations of a binomial are 69.
  assert abs(len(heldout) - 200) < 69
  _, other = data.split_by_file(whole, 0.05, 1)
  assert len(set(heldout) & set(other)) < 40
  # The split is part of what makes a run reproducible: it may not change.
  names = [d.name for d in data.split_by_file(whole[:120], 0.05, 0)[1]]
  assert names == ["10", "1028", "1065", "107"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2])
def test_split_refuses_impossible_fractions(fraction):
  with pytest.raises(ValueError, match=f"heldout_fraction={fraction}"):
    data.split_by_file(documents("ab"), fraction)


def test_split_refuses_an_empty_side():
  with pytest.raises(ValueError, match="use more files"):
    data.split_by_file(documents("a"), 0.5)


@hypothesis.given(st.integers(1, 100), st.integers(5, 300))
def test_sample_keeps_its_limits_and_the_order(max_documents, max_bytes):
  whole = [data.Document(f"{i:02}", "é" * (1 + i % 7)) for i in range(53)]
  kept = data.sample(
      whole, max_documents=max_documents, max_bytes=max_bytes
  )
  assert 1 <= len(kept) <= max_documents
  total = sum(document.num_bytes for document in kept)
  assert total <= max_bytes
  assert kept == [d for d in whole if d in set(kept)]
  # Nothing that still fits is left behind.
  if len(kept) < max_documents:
    left = [d.num_bytes for d in whole if d not in set(kept)]
    assert not left or total + min(left) > max_bytes


def test_sample_spreads_over_the_source():
  whole = documents(f"{i:04}" for i in range(1000))
  kept = data.sample(whole, max_bytes=100 * 11)
  assert len(kept) == 100
  thirds = [0, 0, 0]
  for document in kept:
    thirds[int(document.name) * 3 // 1000] += 1
  assert min(thirds) > 15
  assert data.sample(whole) == whole
  with pytest.raises(ValueError, match="max_bytes=3 leave none"):
    data.sample(whole, max_bytes=3)
