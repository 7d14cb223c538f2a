"""The loss, in chunks and on several devices, is that of all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import AttentionConfig, MLPConfig, ModelConfig
from jaxlm.parallel.mesh import make_mesh
from jaxlm.train import loss
from quick import quick_jit

BATCH, LENGTH, D_MODEL, VOCAB = 4, 6, 8, 20
CONFIG = ModelConfig(VOCAB, D_MODEL, 1, AttentionConfig(1, 1, 2), MLPConfig(3),
                     final_soft_cap=3.0)
# All tokens at once; chunks of five and what is left; on each device chunks
# of two.
CHUNKS = [1000, 5 * VOCAB, 2 * VOCAB // 2]
MESHES = [None, {"data": 2, "context": 2, "tensor": 2}]


def inputs():
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.float32(random.normal(size=shape))
  params = {"unembedding": normal(D_MODEL, VOCAB)}
  return (params, normal(BATCH, LENGTH, D_MODEL),
          random.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32),
          random.random((BATCH, LENGTH)) < 0.7)


def direct(params, hidden_BTD, targets_BT, mask_BT, z_loss=0.0):
  logits_BTV = 3 * jnp.tanh(hidden_BTD @ params["unembedding"] / 3)
  nats_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV),
                                 targets_BT[..., None], -1)[..., 0]
  nats_BT += z_loss * jax.nn.logsumexp(logits_BTV, -1) ** 2
  return nats_BT * mask_BT


def of_each(params, *args):
  return loss.token_losses(CONFIG, params, *args)


def total(params, *args):
  return loss.next_token_loss(CONFIG, params, *args, z_loss=0.01)[0]


def on(sizes, function, *args):
  # Another function each time, lest jax remember it with other chunks.
  run = quick_jit(lambda *args: function(*args))
  if sizes is None:
    return run(*args)
  with jax.set_mesh(make_mesh(sizes)):
    return run(*args)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_losses_of_tokens(monkeypatch, sizes, chunk):
  monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
  found_BT = on(sizes, of_each, *inputs())
  assert found_BT.dtype == jnp.float32
  np.testing.assert_allclose(found_BT, direct(*inputs()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_sum_and_its_gradients(monkeypatch, sizes, chunk):
  monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
  found = on(sizes, jax.value_and_grad(total, (0, 1)), *inputs())
  expected = jax.value_and_grad(
      lambda *args: jnp.sum(direct(*args, z_loss=0.01)), (0, 1))(*inputs())
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(on(sizes, total, *inputs()), expected[0],
                             rtol=1e-6)


def test_losses_of_tokens_store_no_more_than_a_chunk(largest_array,
                                                     monkeypatch):
  monkeypatch.setattr(loss, "CHUNK_LOGITS", 5 * VOCAB)
  assert largest_array(lambda *args: of_each(*args), *inputs()) == max(
      BATCH * LENGTH * D_MODEL, 5 * VOCAB)
  assert largest_array(direct, *inputs()) == BATCH * LENGTH * VOCAB
