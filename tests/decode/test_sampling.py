"""Sampling against transformers' logits processors and by hand."""
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxlm.decode.sampling import Sampling, restrict, sample

LOGITS = np.random.default_rng(0).normal(0, 2, (5, 131)).astype(np.float32)


def kept(logits_BV, **fields):
  sampling = Sampling(1.0, **fields).checked()
  return np.isfinite(np.asarray(restrict(jnp.asarray(logits_BV), sampling)))


@hypothesis.given(
    top_k=st.none() | st.integers(1, 140), top_p=st.none() | st.floats(.01, 1),
    min_p=st.none() | st.floats(0, 1), scale=st.floats(.1, 5))
@hypothesis.settings(max_examples=40, deadline=None)
def test_what_is_kept_is_what_transformers_keeps(top_k, top_p, min_p, scale):
  logits, scores = LOGITS * np.float32(scale), None
  scores = torch.tensor(logits)
  if top_k is not None:
    scores = transformers.TopKLogitsWarper(top_k)(None, scores)
  if top_p is not None:
    scores = transformers.TopPLogitsWarper(top_p)(None, scores)
  if min_p is not None:
    scores = transformers.MinPLogitsWarper(min_p)(None, scores)
  ours, theirs = kept(logits, top_k=top_k, top_p=top_p, min_p=min_p), (
      torch.isfinite(scores).numpy())
  if top_p is None:
    np.testing.assert_array_equal(ours, theirs)
  # A sum of probabilities may reach top_p a rounding sooner or later, and of
  # tokens as likely as each other all stay here.
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  differing = np.where(ours != theirs, probs, 0).sum(-1) / probs.sum(-1)
  last = np.where(ours, probs, np.inf).min(-1) / probs.sum(-1)
  assert (differing <= last + 1e-5).all()


def test_by_hand():
  logits = np.log(np.array([[.5, .25, .125, .125]], np.float32))
  assert kept(logits, top_k=2).tolist() == [[True, True, False, False]]
  assert kept(logits, top_k=3).all()  # a tie with the last
  assert kept(logits, top_p=.5).tolist() == [[True, False, False, False]]
  assert kept(logits, top_p=.51).tolist() == [[True, True, False, False]]
  # Of the two that top-k leaves, the first has two thirds.
  assert kept(logits, top_k=2, top_p=.6).tolist() == [
      [True, False, False, False]]
  assert kept(logits, min_p=.5).tolist() == [[True, True, False, False]]
  assert kept(logits, top_p=1.0).all() and kept(logits, min_p=0.0).all()


def test_the_penalty_is_that_of_transformers():
  tokens = np.array([[3, 7, 7], [1, 2, 130], [0, 0, 0], [5, 6, 7], [9, 8, 7]])
  theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(
      torch.tensor(tokens), torch.tensor(LOGITS)).numpy()
  seen = np.zeros(LOGITS.shape, bool)
  np.put_along_axis(seen, tokens, True, 1)
  sampling = Sampling(repetition_penalty=1.7).checked()
  ours = sample(jnp.asarray(LOGITS), None, sampling, seen)
  np.testing.assert_array_equal(ours, theirs.argmax(-1))
  # Where a seen token leads, it must be overtaken or not as theirs is.
  for token in range(131):
    raised, seen = LOGITS.copy(), np.zeros(LOGITS.shape, bool)
    raised[:, token] = 1.3 * LOGITS.max(1)
    seen[:, token] = True
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(
        torch.full((5, 1), token), torch.tensor(raised)).numpy()
    np.testing.assert_array_equal(
        sample(jnp.asarray(raised), None, sampling, seen), theirs.argmax(-1))


def test_draws_follow_what_is_kept():
  logits = jnp.asarray(np.repeat(LOGITS[:1], 4000, 0))
  sampling = Sampling(.7, top_k=3).checked()
  drawn = np.asarray(sample(logits, jax.random.key(0), sampling))
  expected = np.asarray(jax.nn.softmax(restrict(
      jnp.asarray(LOGITS[:1]) / .7, sampling)))[0]
  share = np.bincount(drawn, minlength=131) / 4000
  assert np.count_nonzero(share) == 3
  assert np.abs(share - expected).max() < 4 * .5 / 4000 ** .5


@pytest.mark.parametrize("fields, message", [
    (dict(temperature=-0.5), "temperature=-0.5: must be at least 0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=float("inf")), "temperature=inf"),
    (dict(top_k=0), "top_k=0: must be at least 1"),
    (dict(top_k=2.5), "top_k=2.5: give a whole number"),
    (dict(top_p=0.0), "top_p=0.0: must be above 0 and at most 1"),
    (dict(top_p=1.5), "top_p=1.5"),
    (dict(min_p=-0.1), "min_p=-0.1: must be at least 0 and at most 1"),
    (dict(repetition_penalty=0), "repetition_penalty=0: must be above 0"),
    (dict(temperature="hot"), "temperature='hot'"),
])
def test_impossible_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**fields).checked()
