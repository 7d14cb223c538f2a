"""A train step is the same on one device and on any mesh."""
import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm.config import (AttentionConfig, MLAConfig, MLPConfig, ModelConfig,
                          MoEConfig, RopeConfig, RouterConfig)
from jaxlm.model.transformer import Execution
from jaxlm.parallel import mesh as mesh_lib
from jaxlm.parallel.params import shardings
from jaxlm.train.optimizer import OptimizerConfig
from jaxlm.train.step import (Balancing, TrainConfig, eval_step, init_state,
                              train_step)
from quick import quick_jit

BATCH, LENGTH, VOCAB = 8, 24, 40
MODELS = {
    "gpt-oss": ModelConfig(
        vocab_size=VOCAB, d_model=48, num_layers=2,
        attention=AttentionConfig(
            8, 4, 6, RopeConfig(), RopeConfig(), sliding_window=7, sinks=True,
            biases=("q", "k", "v", "o")),
        moe=MoEConfig(8, 3, MLPConfig(16, "clamped_swiglu", bias=True,
                                      interleaved=True),
                      RouterConfig("topk_softmax", bias=True)),
        layer_pattern=("sliding", "full")),
    "dense": ModelConfig(
        vocab_size=VOCAB, d_model=48, num_layers=2,
        attention=AttentionConfig(8, 4, 6), mlp=MLPConfig(56, bias=True),
        max_positions=LENGTH, tie_embeddings=True, final_soft_cap=7.0),
    "deepseek": ModelConfig(
        vocab_size=VOCAB, d_model=48, num_layers=2,
        attention=MLAConfig(4, 10, 8, 6, 12, q_rank=14),
        mlp=MLPConfig(56), num_dense_layers=1,
        moe=MoEConfig(8, 3, MLPConfig(16),
                      RouterConfig("sigmoid_topk", renormalize=True,
                                   balance_bias=True, num_groups=4,
                                   groups_per_token=2),
                      shared=MLPConfig(20))),
}
BALANCING = {
    "gpt-oss": Balancing(switch=0.3, cv_importance=0.1, router_z=0.01),
    "dense": Balancing(),
    "deepseek": Balancing(sequence=0.2, bias_rule="sign"),
}
MESHES = {
    "gpt-oss": ({"expert": 8}, {"expert": 4, "tensor": 2},
                {"expert": 2, "data": 4},
                {"expert": 2, "context": 2, "tensor": 2}),
    "dense": ({"data": 8}, {"data": 2, "tensor": 4},
              {"data": 4, "context": 2}),
    "deepseek": ({"expert": 4, "data": 2}, {"tensor": 4, "expert": 2}),
}


def train_config(name: str, **execution) -> TrainConfig:
  # A step that follows the gradient's size, not only its sign.
  return TrainConfig(
      3, BATCH, LENGTH, optimizer=OptimizerConfig(eps=1e-2, clip_norm=0),
      balancing=BALANCING[name], z_loss=0.01,
      execution=Execution(remat="full", **execution))


@functools.cache
def batch():
  rng = np.random.default_rng(5)
  shape = (BATCH, LENGTH)
  return {"tokens": rng.integers(0, VOCAB, shape).astype(np.int32),
          "targets": rng.integers(0, VOCAB, shape).astype(np.int32),
          "segment_ids": np.sort(rng.integers(0, 3, shape)).astype(np.int32),
          "mask": rng.random(shape) < 0.8}


def step_on(name: str, mesh, **execution):
  """The state after one step, its metrics, and an evaluation of it."""
  configs = MODELS[name], train_config(name, **execution)
  init, step, evaluate = (functools.partial(f, *configs) for f in
                          (init_state, train_step, eval_step))
  # As what belongs to a seed is the same on any mesh, so is the state.
  where = shardings(configs[0], jax.eval_shape(init, 0), mesh)
  with jax.set_mesh(mesh):
    state = quick_jit(init, out_shardings=where)(0)
    rows = jax.device_put(batch(), jax.NamedSharding(
        mesh, mesh_lib.spec("batch", "length")))
    state, metrics = quick_jit(step, out_shardings=(where, None))(
        state, rows, 0)
    sums = quick_jit(evaluate)(state.params, rows)
  assert all(jax.tree.leaves(jax.tree.map(
      lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, where)))
  return jax.tree.map(np.asarray, (state, metrics, sums))


@functools.cache
def on_one_device(name: str):
  return step_on(name, mesh_lib.make_mesh({}, jax.devices()[:1]))


def assert_same(ours, theirs, tolerance):
  def compare(path, x, y):
    scale = np.abs(y).max() or 1
    assert np.abs(x - y.astype(np.float64)).max() < tolerance * scale, (
        jax.tree_util.keystr(path))
  jax.tree.map_with_path(compare, ours, theirs)


@pytest.mark.parametrize("name, sizes", [
    (name, sizes) for name in MODELS for sizes in MESHES[name]])
def test_a_step_is_the_same_on_any_mesh(name, sizes):
  state, metrics, sums = step_on(name, mesh_lib.make_mesh(sizes))
  state1, metrics1, sums1 = on_one_device(name)
  assert_same(metrics, metrics1, 3e-6)
  assert_same(sums, sums1, 3e-6)
  # On one device, other last bits of the parameters move layer 0's v_bias by up
  # to 1.3e-5, and nothing else by more than 7e-6.
  assert_same(state, state1, 2e-5)


def test_one_device_of_a_mesh_is_as_without():
  init, step = (functools.partial(f, MODELS["gpt-oss"],
                                  train_config("gpt-oss"))
                for f in (init_state, train_step))
  state, metrics = quick_jit(step)(quick_jit(init)(0), batch(), 0)
  state1, metrics1, _ = on_one_device("gpt-oss")
  assert_same((state.params, metrics), (state1.params, metrics1), 1e-5)


def test_a_batch_that_does_not_divide_is_refused():
  with jax.set_mesh(mesh_lib.make_mesh({"expert": 8})):
    with pytest.raises(ValueError, match="tokens_BT: batch=6 does not divide "
                       "over the mesh's expert=8: use"):
      jax.eval_shape(functools.partial(
          train_step, MODELS["gpt-oss"], train_config("gpt-oss")),
          jax.eval_shape(functools.partial(
              init_state, MODELS["gpt-oss"], train_config("gpt-oss")), 0),
          {k: v[:6] for k, v in batch().items()}, 0)


def test_every_process_traces_the_same_program():
  """Though sets of strings have another order in each."""
  script = """if True:
    import functools, hashlib, jax
    from parallel.test_sharded_step import *
    configs = MODELS["gpt-oss"], train_config("gpt-oss")
    state = jax.eval_shape(functools.partial(init_state, *configs), 0)
    with jax.set_mesh(mesh_lib.make_mesh({"data": 4, "expert": 2})):
      text = jax.jit(functools.partial(train_step, *configs)).lower(
          state, batch(), 0).as_text()
    print(hashlib.sha256(text.encode()).hexdigest())
  """
  root = pathlib.Path(__file__).parents[2]
  found = {subprocess.run(
      [sys.executable, "-c", script], check=True, capture_output=True,
      env=os.environ | {"PYTHONHASHSEED": seed, "JAX_NUM_CPU_DEVICES": "8",
                        "PYTHONPATH": f"{root}:{root / 'tests'}"}).stdout
      for seed in "1234"}
  assert len(found) == 1
