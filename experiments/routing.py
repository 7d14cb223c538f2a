"""Where a model sends tokens, and whether what it sends where means anything.

  sample = routing.take(documents, tokenizer, seq_len=256, num_tokens=4096)
  seen = routing.observe(config, params, sample)
  routing.load(seen), routing.specialisation(seen, layer=0), ...
  routing_text.show(seen, layer=0)      # coloured text, in a notebook

Chance is what remains when tokens are held against the experts of others: each
row of experts is taken for another row and turned round by a random number of
places. Experts of neighbours stay neighbours, so that what is due to long runs
of one kind and one expert counts as chance.
"""
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments import token_kinds
from jaxlm.config import ModelConfig
from jaxlm.data import Document
from jaxlm.model.trace import trace
from jaxlm.model.transformer import Execution

BATCH = 8  # rows that go through the model together
SHUFFLES = 100
SEEN_OFTEN = 10  # how often a token must occur to characterise an expert
# Of a row's length: where its tokens stand, the first by itself.
POSITIONS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
  """A text as the model reads it.

  tokens_BT, segment_ids_BT: int32; rows go on one from the other.
  kind_N: of each token, as a place in `kinds`; N = B T.
  pieces: the text, in parts of one token or of one character's.
  names: of each document's first token, the document's.
  """
  tokens_BT: np.ndarray
  segment_ids_BT: np.ndarray
  kind_N: np.ndarray
  kinds: tuple[str, ...]
  pieces: list[token_kinds.Piece]
  names: dict[int, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
  """A sample's experts in the L expert layers, as in `jaxlm.model.trace`."""
  sample: Sample
  num_experts: int
  expert_LBTA: np.ndarray
  weight_LBTA: np.ndarray

  @property
  def num_layers(self) -> int:
    return len(self.expert_LBTA)


class Association(NamedTuple):
  """How much of tokens' labels (K of them) their experts tell.

  bits: mutual information of a routed row's label and its expert.
  chance_S: the same by chance, so many times. entropy: the labels', in bits.
  lift_KE: how much more often an expert gets a label than tokens have it.
  beyond_KE: whether that is outside all that chance gave.
  """
  bits: float
  chance_S: np.ndarray
  entropy: float
  lift_KE: np.ndarray
  beyond_KE: np.ndarray


class Characteristic(NamedTuple):
  """A token that an expert gets more often than any token of any expert by
  chance. count: how often it does; lift: how much more often than expected."""
  token: int
  lift: float
  count: int


def take(documents: Sequence[Document], tokenizer, seq_len: int,
         num_tokens: int, beginning: Sequence[int] = ()) -> Sample:
  """The beginnings of documents, an equal share of each, as rows.

  Args:
    beginning: tokens that the model expects before a document.

  Raises:
    ValueError: there are no tokens.
  """
  python = all(document.name.endswith(".py") for document in documents)
  kinds = token_kinds.PYTHON if python else token_kinds.PROSE
  tokens, kind, segments, pieces, names = [], [], [], [], {}
  for number, document in enumerate(documents, 1):
    left = num_tokens - len(tokens)
    share = -(-left // (len(documents) - number + 1))
    if share <= len(beginning):
      break
    # A token is hardly longer than this; a whole book would take long.
    ids = tokenizer.encode(document.text[:64 * share])
    ids = [*beginning, *ids, tokenizer.end_of_document][:share]
    found = token_kinds.pieces(tokenizer, ids)
    special_N = tokenizer.token_bytes()[ids] == 0
    kind_N = token_kinds.kinds_of_tokens(
        [piece._replace(text="") if special_N[piece.start] else piece
         for piece in found], document.text, python)
    kind += np.where(special_N, len(kinds) - 1, kind_N).tolist()
    pieces += [piece._replace(start=piece.start + len(tokens),
                              stop=piece.stop + len(tokens))
               for piece in found]
    names[len(tokens)] = document.name
    tokens += ids
    segments += [number] * len(ids)
  if len(tokens) < 2:
    raise ValueError(f"{len(tokens)} tokens: nothing to look at; give more "
                     "text or let more tokens be taken")
  seq_len = min(seq_len, len(tokens))
  size = len(tokens) // seq_len * seq_len
  tokens_BT, segments_BT = (
      np.array(x[:size], np.int32).reshape(-1, seq_len)
      for x in (tokens, segments))
  return Sample(tokens_BT, segments_BT, np.array(kind[:size], np.int32), kinds,
                [piece for piece in pieces if piece.stop <= size],
                {place: name for place, name in names.items() if place < size})


def observe(config: ModelConfig, params: dict, sample: Sample,
            execution: Execution = Execution()) -> Seen:
  """Sends a sample through the model, a few rows at a time.

  Raises:
    ValueError: the model has no experts, or not all of the sample's tokens.
  """
  if config.moe is None:
    raise ValueError("the model is dense: it has no experts to look at")
  last = sample.tokens_BT.max()
  if last >= config.vocab_size:
    raise ValueError(f"token {last} is outside the model's vocabulary of "
                     f"{config.vocab_size}: is this its tokenizer?")
  found = [
      trace(config, params, sample.tokens_BT[i:i + BATCH], execution=execution,
            segment_ids_BT=sample.segment_ids_BT[i:i + BATCH])
      for i in range(0, len(sample.tokens_BT), BATCH)]
  return Seen(sample, config.moe.num_experts, *(
      np.concatenate([np.asarray(x) for x in parts], 1) for parts in
      zip(*((x.expert_LBTA, x.weight_LBTA) for x in found))))


def load(seen: Seen) -> np.ndarray:
  """The share of the routed rows that each expert gets, [L, E]."""
  counts_LE = np.stack([_count(expert_BTA.reshape(-1), seen.num_experts)
                        for expert_BTA in seen.expert_LBTA])
  return counts_LE / counts_LE.sum(1, keepdims=True)


def _count(index, size):
  """How often each of `size` numbers is there; others are not counted."""
  return np.bincount(index[index < size], minlength=size)


def coactivation(seen: Seen, layer: int) -> tuple[np.ndarray, np.ndarray]:
  """How many tokens two experts share, and how many they would if choices
  were independent; [E, E] each, zero from an expert to itself.

  Independent is e_ij = w_i w_j for i != j with each expert's sum as it is
  (quasi-independence: a token never chooses one expert twice).
  """
  chosen_NE = _chosen(seen, layer)
  counts_EE = chosen_NE.T @ chosen_NE
  np.fill_diagonal(counts_EE, 0)
  total_E = counts_EE.sum(1)
  w_E = total_E / np.sqrt(max(total_E.sum(), 1))
  for _ in range(500):  # the root damps, else it swings
    others_E = w_E.sum() - w_E
    w_E = np.sqrt(w_E * total_E / np.maximum(others_E, 1e-30))
  expected_EE = np.outer(w_E, w_E)
  np.fill_diagonal(expected_EE, 0)
  return counts_EE, expected_EE


def _chosen(seen, layer):
  """Whether each token goes to each expert, float64 [N, E]."""
  expert_NA = seen.expert_LBTA[layer].reshape(-1, seen.expert_LBTA.shape[-1])
  chosen_NE = np.zeros((len(expert_NA), seen.num_experts + 1))
  np.put_along_axis(chosen_NE, expert_NA, 1, 1)
  return chosen_NE[:, :-1]


def positions(sample: Sample) -> tuple[np.ndarray, int]:
  """Where in its row each token stands, [N], and in how many classes: the
  first, then `POSITIONS` equal parts."""
  length = sample.tokens_BT.shape[1]
  of_row = 1 + np.arange(length) * POSITIONS // length
  of_row[0] = 0
  return np.tile(of_row, len(sample.tokens_BT)), POSITIONS + 1


def mean_place(seen: Seen, layer: int) -> np.ndarray:
  """Where in their rows, from 0 to 1, each expert's tokens stand, [E]; nan
  without any."""
  rows, length = seen.sample.tokens_BT.shape
  place_N = np.tile((np.arange(length) + 0.5) / length, rows)
  chosen_NE = _chosen(seen, layer)
  with np.errstate(invalid="ignore"):
    return place_N @ chosen_NE / chosen_NE.sum(0)


def specialisation(seen: Seen, layer: int, label_N=None,
                   num_labels: int = 0) -> Association:
  """Whether experts get different kinds of tokens, or other labels'."""
  if label_N is None:
    label_N, num_labels = seen.sample.kind_N, len(seen.sample.kinds)
  counts_KE = _joint(seen, layer, label_N, num_labels)
  chance_SKE = np.stack([
      _joint(seen, layer, label_N, num_labels, elsewhere)
      for elsewhere in _elsewhere(seen)])
  share_K = np.bincount(label_N, minlength=num_labels) / len(label_N)
  lift_KE, chance_lift_SKE = (_lift(x, share_K)
                              for x in (counts_KE, chance_SKE))
  return Association(
      float(_information(counts_KE)), _information(chance_SKE),
      float(-np.sum(share_K * _log2(share_K))), lift_KE,
      (lift_KE > chance_lift_SKE.max(0)) | (lift_KE < chance_lift_SKE.min(0)))


def characteristic(seen: Seen, layer: int,
                   most: int = 6) -> list[list[Characteristic]]:
  """For each expert the tokens that it gets most out of proportion.

  Counts are raised by `SEEN_OFTEN` on both sides, or the rarest tokens would
  always come first. Only what exceeds the 95th percentile of the largest value
  that chance gives is kept.
  """
  tokens_N = seen.sample.tokens_BT.reshape(-1)
  present, label_N, counts_V = np.unique(tokens_N, return_inverse=True,
                                         return_counts=True)
  often = counts_V >= SEEN_OFTEN
  if not often.any():
    return [[] for _ in range(seen.num_experts)]
  # What is rare falls into one class, which is left out in the end.
  place_V = np.where(often, np.cumsum(often) - 1, often.sum())
  label_N, size = place_V[label_N.reshape(-1)], int(often.sum())
  share_V = counts_V[often] / len(tokens_N)

  def lifts(elsewhere=None):
    counts_VE = _joint(seen, layer, label_N, size + 1, elsewhere)[:size]
    total_E = _count(seen.expert_LBTA[layer].reshape(-1), seen.num_experts)
    expected_VE = share_V[:, None] * total_E
    return counts_VE, counts_VE / np.maximum(expected_VE, 1e-30), (
        (counts_VE + SEEN_OFTEN) / (expected_VE + SEEN_OFTEN))

  bar = np.percentile([lifts(x)[2].max() for x in _elsewhere(seen)], 95)
  counts_VE, lift_VE, raised_VE = lifts()
  return [
      [Characteristic(int(present[often][v]), float(lift_VE[v, e]),
                      int(counts_VE[v, e]))
       for v in np.argsort(-raised_VE[:, e])[:most] if raised_VE[v, e] > bar]
      for e in range(seen.num_experts)]


def _elsewhere(seen):
  """For each shuffle, the token [N] whose experts each token is given."""
  random = np.random.default_rng(0)
  rows, length = seen.sample.tokens_BT.shape
  for _ in range(SHUFFLES):
    row_B1 = random.permutation(rows)[:, None]
    shift_B1 = random.integers(1, max(length, 2), (rows, 1))
    yield (row_B1 * length
           + (np.arange(length) + shift_B1) % length).reshape(-1)


def _joint(seen, layer, label_N, num_labels, elsewhere_N=None):
  """How many routed rows have each label and go to each expert, [K, E]."""
  expert_NA = seen.expert_LBTA[layer].reshape(len(label_N), -1)
  if elsewhere_N is not None:
    expert_NA = expert_NA[elsewhere_N]
  index_NA = label_N[:, None] * (seen.num_experts + 1) + expert_NA
  counts = np.bincount(index_NA.reshape(-1),
                       minlength=num_labels * (seen.num_experts + 1))
  return counts.reshape(num_labels, -1)[:, :-1]


def _log2(x):
  return np.log2(np.where(x > 0, x, 1))


def _information(counts):
  """Mutual information in bits of the last two axes."""
  p = counts / counts.sum((-2, -1), keepdims=True)
  apart = p.sum(-2, keepdims=True) * p.sum(-1, keepdims=True)
  return np.sum(p * (_log2(p) - _log2(apart)), (-2, -1))


def _lift(counts_KE, share_K):
  """P(label | expert) / P(label); nan where there is no such label or
  nothing for the expert."""
  expected_KE = share_K[:, None] * counts_KE.sum(-2, keepdims=True)
  return np.where(expected_KE > 0, counts_KE / np.maximum(expected_KE, 1e-30),
                  np.nan)
