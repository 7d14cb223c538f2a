"""What is made of choices: worked by hand, and told from chance."""
import numpy as np
import pytest

from experiments import routing, routing_text
from experiments.token_kinds import Piece
from jaxlm.data import ByteTokenizer, Document


def seen_of(expert_BTA, tokens_BT=None, kind_N=None, num_experts=3,
            pieces=(), weight=0.5):
  """One layer's choices as what was seen of a sample."""
  expert_BTA = np.asarray(expert_BTA)
  shape = expert_BTA.shape[:2]
  tokens_BT = np.zeros(shape, np.int32) if tokens_BT is None else tokens_BT
  kind_N = np.zeros(tokens_BT.size, np.int32) if kind_N is None else kind_N
  sample = routing.Sample(tokens_BT, np.ones(shape, np.int32), kind_N,
                          ("this", "that"), list(pieces), {0: "a < b"})
  return routing.Seen(sample, num_experts, expert_BTA[None],
                      np.full(expert_BTA[None].shape, weight))


def test_load_counts_routed_rows():
  # The last token's second place is nobody's, as under expert choice.
  seen = seen_of([[[0, 1], [0, 2]], [[1, 0], [0, 3]]])
  np.testing.assert_allclose(routing.load(seen), [[4 / 7, 2 / 7, 1 / 7]])


def test_places_are_means_over_an_expert_s_tokens():
  seen = seen_of([[[0], [1], [1], [0]]])
  np.testing.assert_allclose(routing.mean_place(seen, 0),
                             [0.5, 0.5, np.nan])
  places_N, classes = routing.positions(seen.sample)
  assert places_N.tolist() == [0, 3, 5, 7] and classes == 9


def test_pairs_are_counted_from_both_sides():
  seen = seen_of([[[0, 1], [1, 0], [2, 1], [0, 2]]])
  counts_EE, expected_EE = routing.coactivation(seen, 0)
  np.testing.assert_array_equal(counts_EE, [[0, 2, 1], [2, 0, 1], [1, 1, 0]])
  # Three experts have three pairs and three loads: nothing is left to differ.
  np.testing.assert_allclose(expected_EE, counts_EE, rtol=1e-6)


def test_pairs_are_held_against_independence():
  """Four experts, even loads, and 0 always with 1, 2 with 3: of 12 tokens six
  have each of those pairs, where each of the six pairs should have two."""
  seen = seen_of([[[0, 1], [2, 3]] * 6], num_experts=4)
  counts_EE, expected_EE = routing.coactivation(seen, 0)
  assert counts_EE[0, 1] == counts_EE[3, 2] == 6 and counts_EE[0, 2] == 0
  np.testing.assert_allclose(expected_EE, 2 * (1 - np.eye(4)), rtol=1e-6)


def test_expected_pairs_have_the_loads_that_were_seen():
  random = np.random.default_rng(0)
  choices = np.stack([random.choice(7, 3, False, [.3, .2, .2, .1, .1, .05, .05])
                      for _ in range(500)])
  counts_EE, expected_EE = routing.coactivation(
      seen_of(choices[None], num_experts=7), 0)
  np.testing.assert_allclose(expected_EE.sum(1), counts_EE.sum(1), rtol=1e-6)
  np.testing.assert_allclose(expected_EE, expected_EE.T)


def test_experts_of_one_kind_each_tell_it_whole():
  random = np.random.default_rng(0)
  kind_N = random.permutation(np.arange(400) % 2)
  found = routing.specialisation(
      seen_of(2 * kind_N.reshape(8, 50, 1), kind_N=kind_N), 0)
  assert found.bits == pytest.approx(1) and found.entropy == pytest.approx(1)
  assert found.chance_S.max() < 0.1
  np.testing.assert_allclose(found.lift_KE, [[2, np.nan, 0], [0, np.nan, 2]])
  np.testing.assert_array_equal(found.beyond_KE, [[1, 0, 1], [1, 0, 1]])


def test_information_by_hand():
  """Joint counts [[2, 1], [0, 1]]: log terms of 1/2, 1/4 and 1/4."""
  seen = seen_of([[[0], [0], [1], [1]]], kind_N=np.array([0, 0, 0, 1]),
                 num_experts=2)
  expected = (0.5 * np.log2(0.5 / (0.75 * 0.5))
              + 0.25 * np.log2(0.25 / (0.75 * 0.5))
              + 0.25 * np.log2(0.25 / (0.25 * 0.5)))
  assert routing.specialisation(seen, 0).bits == pytest.approx(expected)


def test_runs_are_not_taken_for_specialisation():
  """Kinds and experts come in long runs that have nothing to do with each
  other: in one sample they tell much of each other, and so they do by chance.
  Shuffled one by one, tokens would make it look like a finding."""
  random = np.random.default_rng(1)
  def runs():
    return np.repeat(random.integers(0, 2, 16), 25)
  beyond = 0
  for _ in range(40):
    kind_N, expert_N = runs(), runs()
    found = routing.specialisation(
        seen_of(expert_N.reshape(8, 50, 1), kind_N=kind_N), 0)
    beyond += found.bits > np.percentile(found.chance_S, 95)
    alone = routing._information(np.histogram2d(
        kind_N, random.permutation(expert_N), 2)[0])
    assert alone < 0.05
  assert beyond <= 8


def test_an_expert_s_own_token_is_found_and_rare_ones_are_not():
  random = np.random.default_rng(2)
  tokens_N = random.choice([5, 6, 7, 8, 9], 800, p=[.3, .3, .3, .09, .01])
  expert_N = np.where(tokens_N == 8, 1, random.integers(0, 3, 800))
  found = routing.characteristic(seen_of(
      expert_N.reshape(8, 100, 1), tokens_N.reshape(8, 100)), 0)
  assert [x.token for x in found[1]] == [8]
  assert found[1][0].count == (tokens_N == 8).sum()
  share = (expert_N == 1).mean()
  assert found[1][0].lift == pytest.approx(1 / share)
  assert found[0] == found[2] == []


def test_nothing_is_characteristic_of_random_choices():
  random = np.random.default_rng(3)
  found = routing.characteristic(seen_of(
      random.integers(0, 3, (8, 100, 2)), random.integers(0, 9, (8, 100))), 0)
  assert sum(map(len, found)) <= 1
  assert routing.characteristic(seen_of([[[0], [1]]]), 0) == [[], [], []]


def test_a_sample_takes_its_share_of_each_document():
  documents = [Document("a.py", "x = 1\n" * 20), Document("b.py", "yes"),
               Document("c.py", "# é\n" * 20)]
  sample = routing.take(documents, ByteTokenizer(), 16, 99)
  assert sample.tokens_BT.shape == (6, 16)  # 33 + 4 + 62, cut to rows
  row_N = sample.tokens_BT.reshape(-1)
  assert bytes(row_N[:33].astype(np.uint8)) == b"x = 1\n" * 5 + b"x ="
  assert bytes(row_N[33:36].astype(np.uint8)) == b"yes" and row_N[36] == 256
  assert sample.names == {0: "a.py", 33: "b.py", 37: "c.py"}
  assert sample.segment_ids_BT.reshape(-1)[[0, 32, 33, 36, 37]].tolist() == [
      1, 1, 2, 2, 3]
  kinds = [sample.kinds[kind] for kind in sample.kind_N]
  assert kinds[:6] == ["identifier", "whitespace", "operator", "whitespace",
                       "number", "whitespace"]
  assert kinds[36:38] == ["special", "comment"]
  prose = routing.take([Document("a.txt", "if 1")], ByteTokenizer(), 16, 99,
                       beginning=[257])
  assert prose.tokens_BT.shape == (1, 6)
  assert [prose.kinds[kind] for kind in prose.kind_N] == [
      "special", "word", "word", "whitespace", "number", "special"]


def test_too_little_text_is_refused():
  with pytest.raises(ValueError, match="1 tokens: nothing to look at"):
    routing.take([Document("a", "text")], ByteTokenizer(), 16, 1)


def test_shown_text_is_escaped_and_coloured():
  pieces = [Piece("<script>", 0, 1), Piece(" &\n", 1, 2), Piece("\0é", 2, 4)]
  seen = seen_of([[[0, 2], [1, 0], [3, 3], [2, 1]]], pieces=pieces)
  shown = routing_text.show(seen)
  assert shown._repr_html_() == shown
  assert "<script>" not in shown and "&lt;script&gt;</span>" in shown
  assert ">a &lt; b</b>" in shown and " &amp;\n</span>" in shown
  assert "\0" not in shown and "\u2400é" in shown
  assert 'title="expert 0: 0.50, 2: 0.50"' in shown
  assert 'style="" title="no expert"' in shown
  colours = routing_text.colours(3)
  assert shown.count(f"background:{colours[1]}") == 2  # in the legend too
  assert len(set(routing_text.colours(128))) == 128


def test_a_part_of_the_text_can_be_shown():
  pieces = [Piece(letter, i, i + 1) for i, letter in enumerate("abcd")]
  seen = seen_of([[[0], [1], [1], [0]]], pieces=pieces)
  text = routing_text.show(seen, start=1, stop=3)
  assert ">b</span>" in text and ">c</span>" in text
  assert ">a</span>" not in text and ">d</span>" not in text
