"""Schedules, the decay mask, clipping and Muon's orthogonalisation."""
import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import (AttentionConfig, MLAConfig, MLPConfig, ModelConfig,
                          MoEConfig, NormConfig, RouterConfig)
from jaxlm.model.transformer import abstract_params
from jaxlm.train.checkpoint import named_leaves
from jaxlm.train.optimizer import (OptimizerConfig, clip, decay_mask,
                                   learning_rate_schedule, make_optimizer,
                                   muon_labels)

ALL_LEAVES = ModelConfig(
    vocab_size=23, d_model=6, num_layers=3, max_positions=9,
    num_dense_layers=1, mlp=MLPConfig(5, gated=False, bias=True),
    norm=NormConfig("layernorm"),
    attention=AttentionConfig(4, 2, 8, biases=("q", "k", "v", "o"),
                              qk_norm=True, sinks=True),
    moe=MoEConfig(7, 2, MLPConfig(5, bias=True),
                  RouterConfig("topk_softmax", bias=True, balance_bias=True)))


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    schedule=st.sampled_from(("cosine", "wsd")), warmup=st.integers(0, 29),
    final=st.floats(0, 1))
def test_schedules_rise_stay_and_fall(schedule, warmup, final):
  steps = 61
  config = OptimizerConfig(learning_rate=0.5, schedule=schedule,
                           warmup_steps=warmup, decay_fraction=0.25,
                           final_fraction=final)
  schedule_ = learning_rate_schedule(config, steps)
  rate = np.asarray(schedule_(jnp.arange(steps + 1)))
  assert rate[0] > 0
  assert np.all(np.diff(rate[:warmup + 1]) > 0)
  np.testing.assert_allclose(rate[warmup], 0.5, rtol=1e-6)
  assert np.all(np.diff(rate[warmup:]) <= 1e-7)
  np.testing.assert_allclose(rate[-1], 0.5 * final, rtol=1e-5, atol=1e-7)
  if schedule == "wsd":
    stable = steps - round(0.25 * steps)
    np.testing.assert_allclose(rate[warmup:stable + 1], 0.5, rtol=1e-6)


def test_only_matrices_decay():
  params = abstract_params(ALL_LEAVES)
  decayed = {name.split("/")[-1]
             for name, decays in named_leaves(decay_mask(params)).items()
             if decays}
  assert decayed == {"q_proj", "k_proj", "v_proj", "o_proj", "up", "down",
                     "gate_up", "router", "unembedding"}


@pytest.mark.parametrize("attention, projections", [
    (ALL_LEAVES.attention, {"q_proj", "k_proj", "v_proj"}),
    (MLAConfig(4, 11, 7, 2, 9, q_rank=10),
     {"q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj"}),
    (MLAConfig(4, 11, 7, 2, 9), {"q_proj", "kv_a_proj", "kv_b_proj"}),
])
def test_muon_takes_the_matrices_of_layers_alone(attention, projections):
  params = abstract_params(dataclasses.replace(ALL_LEAVES,
                                               attention=attention))
  labels = named_leaves(muon_labels(params))
  taken = {name.split("/")[-1] for name, label in labels.items()
           if label == "muon"}
  assert taken == projections | {"o_proj", "up", "down", "gate_up"}


@pytest.mark.parametrize("max_norm", [0.3, 1e9])
def test_clip_agrees_with_optax(max_norm):
  grads = {"a": jnp.arange(15.0).reshape(3, 5), "b": -jnp.ones(7)}
  expected, _ = optax.clip_by_global_norm(max_norm).update(grads, None)
  ours, _ = clip(max_norm).update(grads, optax.EmptyState())
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours,
               expected)


def newton_schulz(g):
  """Jordan's five steps on one matrix, in float64."""
  x = g if g.shape[0] <= g.shape[1] else g.T
  x = x / np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
  return x if g.shape[0] <= g.shape[1] else x.T


MATRIX_SHAPES = {  # leaf: shape, and that of each matrix within
    "q_proj": ((2, 12, 3, 5), (12, 15)), "o_proj": ((2, 3, 5, 12), (15, 12)),
    "gate_up": ((2, 4, 12, 14), (12, 14)), "down": ((2, 4, 7, 12), (7, 12))}


def test_muon_orthogonalises_each_matrix_by_itself():
  rng = np.random.default_rng(0)
  grads = {name: jnp.asarray(rng.normal(size=shape), jnp.float32)
           for name, (shape, _) in MATRIX_SHAPES.items()}
  params = jax.tree.map(jnp.zeros_like, grads)
  config = OptimizerConfig(name="muon", learning_rate=1.0, clip_norm=0.0,
                           final_fraction=1.0)
  optimizer = make_optimizer(config, 10)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  for name, (_, (rows, columns)) in MATRIX_SHAPES.items():
    ours = np.asarray(updates[name]).reshape(-1, rows, columns)
    matrices = np.asarray(grads[name], np.float64).reshape(-1, rows, columns)
    for update, matrix in zip(ours, matrices, strict=True):
      scale = -0.2 * np.sqrt(max(rows, columns))  # to AdamW's RMS
      np.testing.assert_allclose(update, scale * newton_schulz(matrix),
                                 atol=2e-4)
      singular = np.linalg.svd(update / scale, compute_uv=False)
      assert 0.6 < singular.min() and singular.max() < 1.3
      # And what an orthogonal matrix keeps: the spaces of the gradient.
      left, _, right = np.linalg.svd(matrix, full_matrices=False)
      cosine = np.sum((left @ right) * update / scale) / min(rows, columns)
      assert cosine > 0.8


@pytest.mark.parametrize("changes, message", [
    ({"schedule": "linear"}, "schedule='linear': use one of"),
    ({"name": "sgd"}, "name='sgd': use one of"),
    ({"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
    ({"b2": 1.0}, r"b2=1.0: must be in \[0, 1\)")])
def test_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    OptimizerConfig(**changes)


def test_refuses_a_warmup_without_end():
  with pytest.raises(ValueError, match="warmup_steps=8 leaves none of steps=8"):
    learning_rate_schedule(OptimizerConfig(warmup_steps=8), 8)
