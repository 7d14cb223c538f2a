"""The step: accumulation, precision, seeds, balancing, donation."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MLPConfig, MoEConfig, RouterConfig
from jaxlm.config_dict import from_dict, to_dict
from jaxlm.model.routing import choose
from jaxlm.model.transformer import Execution
from jaxlm.train import (Balancing, OptimizerConfig, TrainConfig, init_state,
                         train_step)
from jaxlm.train.step import check_together, eval_step
from pallas_kernels.quant import MXFP4
import toy_training as toy
from quick import quick_jit

# Adam divides by the gradient's own size, which hides what the gradient is;
# this large eps leaves a step proportional to it; the rate makes the steps
# large beside the rounding of the parameters that they are read from.
PLAIN = OptimizerConfig(learning_rate=10.0, eps=1e3, b1=0.0, b2=0.0,
                        weight_decay=0.0, clip_norm=0.0)
TRAIN = TrainConfig(steps=50, batch_size=4, seq_len=toy.SEQ_LEN,
                    optimizer=PLAIN)


@functools.cache
def compiled(train_config, model=toy.MOE):
  return quick_jit(functools.partial(train_step, model, train_config))


@functools.cache
def state(seed=3, model=toy.MOE):
  return quick_jit(functools.partial(init_state, model, TRAIN))(seed)


def change(train_config, model=toy.MOE):
  """The parameters' change in a step, and its metrics."""
  old = state(model=model)
  new, metrics = compiled(train_config, model)(
      old, toy.random_batch(model, 4), np.uint32(3))
  return jax.tree.map(lambda x, y: np.asarray(x - y), new.params,
                      old.params), metrics


def relative(x, y):
  """The largest difference over the largest entry, of all leaves."""
  x, y = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])
          for tree in (x, y))
  return np.max(np.abs(x - y)) / np.max(np.abs(y))


def test_accumulated_equals_whole_batch():
  whole, metrics = change(TRAIN)
  parts, metrics_of_parts = change(dataclasses.replace(TRAIN, accumulate=2))
  assert relative(parts, whole) < 2e-5
  assert set(metrics) == set(metrics_of_parts)
  for name in metrics:
    np.testing.assert_allclose(metrics_of_parts[name], metrics[name],
                               rtol=2e-5, atol=1e-6, err_msg=name)


def test_parts_of_the_batch_have_unequal_targets():
  targets = toy.random_batch(toy.MOE, 4)["mask"].sum(1)
  assert targets[:2].sum() != targets[2:].sum()


def test_mixed_precision_is_close_to_float32():
  """Without experts: a router's choice between near equals may turn."""
  config = dataclasses.replace(TRAIN, execution=Execution(dtype="bfloat16"))
  whole, metrics = change(TRAIN, toy.DENSE)
  mixed, metrics_mixed = change(config, toy.DENSE)
  np.testing.assert_allclose(metrics_mixed["loss"], metrics["loss"], rtol=1e-2)
  assert 1e-6 < relative(mixed, whole) < 0.03  # another precision, but close
  new, _ = compiled(config, toy.DENSE)(
      state(model=toy.DENSE), toy.random_batch(toy.DENSE, 4), np.uint32(3))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(new.params))


def test_seeds_under_vmap_equal_seeds_alone():
  step = functools.partial(train_step, toy.MOE, TRAIN)
  seeds = (3, 11)
  batches = [toy.random_batch(toy.MOE, 4, seed) for seed in seeds]
  stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
  states = jax.tree.map(lambda *x: jnp.stack(x), *map(state, seeds))
  together, metrics = quick_jit(jax.vmap(step))(states, stacked,
                                          np.array(seeds, np.uint32))
  for i, seed in enumerate(seeds):
    alone, metrics_alone = compiled(TRAIN)(state(seed), batches[i],
                                           np.uint32(seed))
    assert relative(jax.tree.map(lambda x: x[i], together.params),
                    alone.params) < 1e-6
    np.testing.assert_allclose(metrics["loss"][i], metrics_alone["loss"],
                               rtol=1e-6)
  assert metrics["loss"][0] != metrics["loss"][1]


def biases(params):
  return params["stack_0"]["layer_0"]["moe"]["balance_bias"]


BALANCED = dataclasses.replace(TRAIN, balancing=Balancing(
    switch=1.0, sequence=0.1, router_z=0.1, cv_importance=0.1,
    bias_rule="sign", bias_rate=0.02))


def test_loss_free_bias_lowers_max_vio_of_a_skewed_router():
  """And nothing but the rule moves the bias: no gradient, no decay."""
  violations, current = [], jax.tree.map(lambda x: x, state())
  moe = current.params["stack_0"]["layer_0"]["moe"]
  moe["balance_bias"] += jnp.array([0.0, 0.3, 0.0, 0.0, 0.0])
  for i in range(30):
    before = biases(current.params)
    current, metrics = compiled(BALANCED)(
        current, toy.random_batch(toy.MOE, 4, i % 4), np.uint32(3))
    shortage = np.sign(1 - 5 * np.asarray(metrics["load"]))
    np.testing.assert_allclose(biases(current.params),
                               before + 0.02 * shortage, atol=1e-7)
    violations.append(float(metrics["max_vio"].mean()))
  assert violations[0] > 1 and np.mean(violations[-8:]) < 0.6


def test_bias_changes_the_choice_and_not_the_weights():
  config = MoEConfig(5, 2, toy.MOE.moe.expert, RouterConfig(balance_bias=True))
  logits = jnp.array([[2.0, 1.0, 0.5, 0.2, 0.1]])
  chosen, weights = choose(config, logits, jnp.array([0, 0, 0, 0, 5.0]))
  assert chosen.tolist() == [[4, 0]]
  np.testing.assert_allclose(weights[0], jax.nn.softmax(logits)[0, [4, 0]])


def test_without_a_rule_the_bias_stays():
  moved, _ = change(TRAIN)
  assert not np.any(biases(moved))


def test_balancing_losses_move_the_router():
  plain, _ = change(TRAIN)
  balanced, _ = change(BALANCED)
  router = lambda p: p["stack_0"]["layer_0"]["moe"]["router"]
  assert relative(router(balanced), router(plain)) > 0.1


def test_config_round_trip():
  config = dataclasses.replace(TRAIN, balancing=Balancing(bias_rule="sign"))
  assert from_dict(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize("changes, message", [
    ({"accumulate": 3}, "accumulate=3 does not divide batch_size=4"),
    ({"steps": 0}, "steps=0: must be at least 1"),
    ({"spike_factor": 0.5}, "spike_factor=0.5 would end"),
    ({"execution": Execution(dtype="float16")}, "use 'bfloat16' or 'float32'"),
    ({"optimizer": OptimizerConfig(warmup_steps=50)}, "warmup_steps=50")])
def test_refuses_a_train_config(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TRAIN, **changes)


@pytest.mark.parametrize("model, changes, message", [
    (dataclasses.replace(toy.DENSE, max_positions=11), {},
     "seq_len=19 exceeds the model's max_positions=11"),
    (toy.DENSE, {"switch": 0.1}, "the model has no moe"),
    (toy.MOE, {"cv_load": 0.1}, "cv_load=0.1 needs router.kind='noisy_topk'"),
    (dataclasses.replace(toy.MOE, moe=dataclasses.replace(
        toy.MOE.moe, router=RouterConfig("expert_choice"))),
     {"sequence": 0.1}, "sequence=0.1 needs tokens that choose"),
    (dataclasses.replace(toy.MOE, moe=dataclasses.replace(
        toy.MOE.moe, router=RouterConfig())), {"bias_rule": "sign"},
     "bias_rule='sign' needs router.balance_bias=True")])
def test_refuses_what_does_not_go_together(model, changes, message):
  config = dataclasses.replace(TRAIN, balancing=Balancing(**changes))
  with pytest.raises(ValueError, match=message):
    check_together(model, config)


# Experts of whole blocks of 32.
BLOCKS = dataclasses.replace(toy.MOE, d_model=32, moe=dataclasses.replace(
    toy.MOE.moe, expert=MLPConfig(64)))


@pytest.mark.parametrize("simulate", ["none", "mxfp4_experts", "fp8"])
def test_the_loss_falls_with_numbers_of_few_bits(simulate):
  config = dataclasses.replace(
      TRAIN, optimizer=dataclasses.replace(
          PLAIN, learning_rate=1e-2, eps=1e-8, b1=0.9, b2=0.95),
      execution=Execution(simulate=simulate))
  now, batch, losses = state(model=BLOCKS), toy.random_batch(BLOCKS, 4), []
  for _ in range(12):
    now, metrics = compiled(config, BLOCKS)(now, batch, np.uint32(3))
    losses.append(float(metrics["loss"]))
  assert np.isfinite(metrics["grad_norm"])
  assert losses[-1] < 0.9 * losses[0]
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(now.params))


def test_evaluation_may_simulate_what_training_does_not():
  config = dataclasses.replace(TRAIN, eval_simulate="mxfp4_experts")
  params, batch = state(model=BLOCKS).params, toy.random_batch(BLOCKS, 4)

  def rounded(path, w):
    *_, parent, name = ("", *(key.key for key in path))
    if parent != "moe" or name not in ("gate_up", "down"):
      return w
    return jnp.asarray(MXFP4.quantize(w).dequantize("float32"))

  def nats(train_config, params):
    return quick_jit(functools.partial(eval_step, BLOCKS, train_config))(
        params, batch)["nats"].sum()
  ours = nats(config, params)
  assert ours == nats(TRAIN, jax.tree.map_with_path(rounded, params))
  assert ours != nats(TRAIN, params)
  # And the other way round; None is what training does.
  aware = dataclasses.replace(TRAIN, execution=Execution(
      simulate="mxfp4_experts"))
  assert nats(aware, params) == ours
  assert nats(dataclasses.replace(aware, eval_simulate="none"),
              params) == nats(TRAIN, params)
  assert from_dict(TrainConfig, to_dict(config)) == config
  with pytest.raises(ValueError, match="eval_simulate='int4'"):
    dataclasses.replace(TRAIN, eval_simulate="int4")
