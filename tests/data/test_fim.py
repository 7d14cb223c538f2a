import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
import numpy as np
import pytest

from jaxlm import data

FIM = data.FimTokens(prefix=257, middle=258, suffix=259)
DOCUMENTS = st.lists(
    st_numpy.arrays(
        np.int32, st.integers(0, 40), elements=st.integers(0, 255)
    ),
    max_size=9,
)


def reassemble(tokens):
  """Reads `<prefix> a <suffix> c <middle> b` as a + b + c."""
  tokens = tokens.tolist()
  assert tokens[0] == FIM.prefix
  suffix, middle = tokens.index(FIM.suffix), tokens.index(FIM.middle)
  assert suffix < middle
  return tokens[1:suffix] + tokens[middle + 1 :] + tokens[suffix + 1 : middle]


@hypothesis.given(DOCUMENTS, st.integers(0, 2**32))
def test_rearranged_documents_reassemble(documents, seed):
  for before, after in zip(
      documents, data.apply_fim(documents, FIM, 1.0, seed), strict=True
  ):
    assert after.dtype == np.int32
    assert len(after) == len(before) + 3
    assert sorted(after) == sorted([*before, *FIM])
    assert reassemble(after) == before.tolist()


@hypothesis.given(DOCUMENTS, st.integers(0, 2**32), st.integers(0, 8))
def test_a_document_depends_on_seed_and_index_alone(documents, seed, index):
  hypothesis.assume(index < len(documents))
  others = [np.zeros(5, np.int32)] * index + [documents[index]]
  whole = list(data.apply_fim(documents, FIM, 0.5, seed))
  again = list(data.apply_fim(others, FIM, 0.5, seed))
  np.testing.assert_array_equal(whole[index], again[index])


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_rate_and_cuts(rate):
  documents = [np.arange(100, dtype=np.int32)] * 3000
  result = data.apply_fim(documents, FIM, rate, 7)
  changed = [document for document in result if len(document) == 103]
  five_deviations = 5 * (3000 * rate * (1 - rate)) ** 0.5
  assert abs(len(changed) - 3000 * rate) <= five_deviations
  if rate == 1.0:
    # Two uniform cuts: each part is a third on average.
    middles = [102 - d.tolist().index(FIM.middle) for d in changed]
    assert 31 < np.mean(middles) < 36
    assert len(set(middles)) > 80


def test_bad_rates_and_tokenizers_without_fim():
  with pytest.raises(ValueError, match="fim_rate=1.5"):
    list(data.apply_fim([], FIM, 1.5))
  with pytest.raises(ValueError, match="no fill-in-the-middle tokens"):
    list(data.apply_fim([], None, 0.1))
