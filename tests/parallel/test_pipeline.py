"""Layers in stages on different devices."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import (AttentionConfig, MLPConfig, ModelConfig, MoEConfig,
                          RopeConfig, RouterConfig)
from jaxlm.model.transformer import Execution, forward, init_params
from jaxlm.parallel import mesh as mesh_lib, pipeline
from jaxlm.parallel.params import shardings
from quick import quick_jit

BATCH, LENGTH = 8, 12
MOE = ModelConfig(
    vocab_size=40, d_model=24, num_layers=4,
    attention=AttentionConfig(4, 2, 6, RopeConfig(), RopeConfig(),
                              sliding_window=5, sinks=True, biases=("q",)),
    moe=MoEConfig(4, 2, MLPConfig(8, "clamped_swiglu", bias=True,
                                  interleaved=True),
                  RouterConfig("topk_softmax", bias=True)),
    layer_pattern=("sliding", "full"))
DENSE = ModelConfig(vocab_size=40, d_model=24, num_layers=4,
                    attention=AttentionConfig(4, 2, 6), mlp=MLPConfig(20))


def tokens():
  rng = np.random.default_rng(3)
  return (rng.integers(0, 40, (BATCH, LENGTH)).astype(np.int32),
          np.sort(rng.integers(0, 3, (BATCH, LENGTH))).astype(np.int32))


def everything(config, params, **execution):
  """Hidden states, load of experts and the gradient of all parameters."""
  execution = Execution(attention="xla", remat="full", **execution)

  def loss(params):
    tokens_BT, segment_ids = tokens()
    output = forward(config, params, tokens_BT, execution=execution,
                     segment_ids_BT=segment_ids)
    do = np.random.default_rng(5).normal(size=output.hidden_BTD.shape)
    load = None if output.router is None else output.router.load_E
    return jnp.sum(output.hidden_BTD * do), (output.hidden_BTD, load)

  (_, found), gradients = quick_jit(jax.value_and_grad(
      loss, has_aux=True))(params)
  return found, gradients


@pytest.mark.parametrize("config, sizes, microbatches", [
    (MOE, {"stage": 2, "data": 2, "tensor": 2}, 2),
    (MOE, {"stage": 2, "expert": 2, "context": 2}, 4),
    (DENSE, {"stage": 4, "data": 2}, 0)])
def test_stages_compute_what_one_device_does(config, sizes, microbatches):
  params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
  mesh = mesh_lib.make_mesh(sizes)
  with jax.set_mesh(mesh):
    found = everything(config, jax.device_put(
        params, shardings(config, params, mesh)), microbatches=microbatches)
  def compare(path, x, y):
    # Nothing depends on the matrix that makes logits.
    assert np.abs(x - y).max() <= 3e-6 * np.abs(y).max(), (
        jax.tree_util.keystr(path))
  jax.tree.map_with_path(compare, *jax.tree.map(
      np.asarray, (found, everything(config, params))))


def test_bubble():
  assert pipeline.bubble(1, 7) == 0
  assert pipeline.bubble(4, 1) == 0.75  # one stage of four works at a time
  assert pipeline.bubble(4, 9) == 0.25


def test_microbatches_that_do_not_divide_are_refused():
  with jax.set_mesh(mesh_lib.make_mesh({"stage": 2, "data": 4})):
    assert pipeline.choose_microbatches(24) == 6
    assert pipeline.choose_microbatches(64) == 8
    with pytest.raises(ValueError, match="microbatches=4 of batch=24: each "
                       "must divide over 4 .*; use 1, 2, 3, 6"):
      pipeline.choose_microbatches(24, 4)


@pytest.mark.parametrize("changes, message", [
    (dict(num_layers=5, layer_pattern=("sliding", "full")), "in 2 runs"),
    (dict(num_layers=6), "layers=3 does not divide .*stage=4: use 1 or 3"),
    (dict(moe=None, mlp=MLPConfig(20)), "gates and what they gate lie side"),
    (dict(moe=dataclasses.replace(MOE.moe, router=RouterConfig(
        "expert_choice"))), "chooses from a whole batch"),
])
def test_layers_that_do_not_divide_are_refused(changes, message):
  config = dataclasses.replace(MOE, **changes)
  with jax.set_mesh(mesh_lib.make_mesh({"stage": 4, "tensor": 2})):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(functools.partial(forward, config),
                     jax.eval_shape(functools.partial(init_params, config),
                                    jax.random.key(0)), tokens()[0])
