"""One step of training, as a pure function of state, batch and seed."""
import dataclasses
import typing

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import ModelConfig, stacks
from jaxlm.model.routing import (BALANCE_RULES, load_statistics,
                                 updated_balance_bias)
from jaxlm.model.simulated import SIMULATIONS
from jaxlm.model.transformer import (Execution, forward, init_params,
                                     per_layer)
from jaxlm.train.loss import next_token_loss, token_losses
from jaxlm.train.optimizer import (OptimizerConfig, learning_rate_schedule,
                                   make_optimizer)

BALANCING_LOSSES = ("cv_importance", "cv_load", "switch", "sequence",
                    "router_z")


@dataclasses.dataclass(frozen=True)
class Balancing:
  """What keeps the experts' loads even.

  cv_importance, cv_load, switch, sequence, router_z: weights of the router's
  losses (`jaxlm.model.routing`), each a mean over the expert layers.
  bias_rule: None, "sign" or "proportional" moves the bias of the choice after
  each step, by `bias_rate` (arXiv 2408.15664).
  """
  cv_importance: float = 0.0
  cv_load: float = 0.0
  switch: float = 0.0
  sequence: float = 0.0
  router_z: float = 0.0
  bias_rule: str | None = None
  bias_rate: float = 0.001

  def __post_init__(self):
    for name in (*BALANCING_LOSSES, "bias_rate"):
      if getattr(self, name) < 0:
        raise ValueError(f"balancing {name}={getattr(self, name)}: must not "
                         "be negative")
    if self.bias_rule not in (None, *BALANCE_RULES):
      raise ValueError(f"balancing bias_rule={self.bias_rule!r}: use None or "
                       f"one of {BALANCE_RULES}")

  @property
  def weights(self) -> dict[str, float]:
    """Of the losses that count."""
    return {name: getattr(self, name) for name in BALANCING_LOSSES
            if getattr(self, name)}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A run of training, but for the model, the data and the seed.

  batch_size: sequences of `seq_len` tokens a step, taken in `accumulate` equal
  parts, one after the other. z_loss: weight of logsumexp(logits)^2.

  eval_every, checkpoint_every: steps between, besides the last; 0 is the last
  alone. eval_batches: of the held-out rows. keep: the newest checkpoints.
  keep_best: besides, those of the least eval_loss, of steps that were
  evaluated. log_every: steps between lines of metrics, besides evaluations and
  the last step.
  eval_simulate: what evaluations simulate, as `Execution.simulate` does; None
  is what training does. So a run in float32 can be evaluated with its experts
  in MXFP4.
  spike_factor: a loss above this many times the median of the steps before it
  (and above this many nats) ends the run; 0 lets every finite loss pass.
  """
  steps: int
  batch_size: int
  seq_len: int
  accumulate: int = 1
  optimizer: OptimizerConfig = OptimizerConfig()
  balancing: Balancing = Balancing()
  execution: Execution = Execution()
  z_loss: float = 0.0
  eval_every: int = 0
  eval_batches: int = 16
  eval_simulate: str | None = None
  log_every: int = 10
  checkpoint_every: int = 0
  keep: int = 2
  keep_best: int = 0
  spike_factor: float = 2.0

  def __post_init__(self):
    for names, least in (
        (("steps", "batch_size", "seq_len", "accumulate", "eval_batches",
          "log_every", "keep"), 1),
        (("eval_every", "checkpoint_every", "keep_best", "z_loss",
          "spike_factor"), 0)):
      for name in names:
        if not getattr(self, name) >= least:
          raise ValueError(f"train {name}={getattr(self, name)}: must be at "
                           f"least {least}")
    if self.batch_size % self.accumulate:
      raise ValueError(f"train accumulate={self.accumulate} does not divide "
                       f"batch_size={self.batch_size}")
    if 0 < self.spike_factor <= 1:
      raise ValueError(f"train spike_factor={self.spike_factor} would end a "
                       "run at an ordinary loss: use 0 or more than 1")
    if self.execution.dtype == "float16":
      raise ValueError("train execution.dtype='float16' needs the loss to be "
                       "scaled: use 'bfloat16' or 'float32'")
    if self.eval_simulate not in (None, *SIMULATIONS):
      raise ValueError(f"train eval_simulate={self.eval_simulate!r}: use None "
                       f"or one of {SIMULATIONS}")
    learning_rate_schedule(self.optimizer, self.steps)

  @property
  def eval_execution(self) -> Execution:
    if self.eval_simulate is None:
      return self.execution
    return dataclasses.replace(self.execution, simulate=self.eval_simulate)


class TrainState(typing.NamedTuple):
  """What a step changes. `params` are float32 whatever the activations are."""
  step: jax.Array
  params: dict
  opt_state: typing.Any


def check_together(model_config: ModelConfig, train_config: TrainConfig):
  """Refuses what either config allows and both together do not."""
  longest = model_config.max_positions
  if longest and train_config.seq_len > longest:
    raise ValueError(f"train seq_len={train_config.seq_len} exceeds the "
                     f"model's max_positions={longest}")
  balancing, moe = train_config.balancing, model_config.moe
  if moe is None:
    if balancing.weights or balancing.bias_rule:
      raise ValueError(f"{balancing} balances experts, but the model has no "
                       "moe: leave it out")
    return
  if balancing.cv_load and moe.router.kind != "noisy_topk":
    raise ValueError(f"balancing cv_load={balancing.cv_load} needs "
                     "router.kind='noisy_topk', whose noise makes the load "
                     f"smooth, not {moe.router.kind!r}: use switch or "
                     "cv_importance")
  if balancing.sequence and moe.router.kind == "expert_choice":
    raise ValueError(f"balancing sequence={balancing.sequence} needs tokens "
                     "that choose their experts, and with router.kind="
                     "'expert_choice' experts choose their tokens: leave it "
                     "out")
  if balancing.bias_rule and not moe.router.balance_bias:
    raise ValueError(f"balancing bias_rule={balancing.bias_rule!r} needs "
                     "router.balance_bias=True: there is no bias to move")


def init_state(model_config: ModelConfig, train_config: TrainConfig,
               seed) -> TrainState:
  """The state before the first step. `seed`: an int or a uint32 scalar."""
  params = init_params(model_config, _keys(seed)[0])
  if not train_config.execution.scan_layers:
    params = per_layer(model_config, params)
  optimizer = make_optimizer(train_config.optimizer, train_config.steps)
  return TrainState(jnp.int32(0), params, optimizer.init(params))


def _keys(seed):
  """Of the initial parameters and of the steps."""
  return jax.random.split(jax.random.key(seed))


def train_step(model_config: ModelConfig, train_config: TrainConfig,
               state: TrainState, batch: dict, seed):
  """One update. Jit it with `state` donated; vmap it over seeds.

  Args:
    batch: tokens, targets, segment_ids and mask, each [B, T].

  Returns:
    The next state, and metrics of this one: loss (nats a target, z-loss
    included, balancing not), grad_norm (before clipping), learning_rate and,
    for expert layers, load [L, E], max_vio [L], entropy [L] and dropped.
  """
  check_together(model_config, train_config)
  optimizer = make_optimizer(train_config.optimizer, train_config.steps)
  key = jax.random.fold_in(_keys(seed)[1], state.step)
  grads, metrics = _gradients(model_config, train_config, state.params, batch,
                              key)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  balancing = train_config.balancing
  if balancing.bias_rule:
    params = _move_biases(model_config, params, metrics["load"], balancing)
  metrics["grad_norm"] = optax.tree.norm(grads)
  metrics["learning_rate"] = jnp.float32(learning_rate_schedule(
      train_config.optimizer, train_config.steps)(state.step))
  if "load" in metrics:
    metrics |= load_statistics(metrics["load"])
  return TrainState(state.step + 1, params, opt_state), metrics


def _gradients(model_config, train_config, params, batch, key):
  """The gradient of the whole batch, and its metrics.

  Parts of a batch may have unequal numbers of targets: each part's nats are
  divided by the targets of the whole batch, so the parts' sum is its mean.
  Balancing losses are a mean over the parts, each with its own statistics.
  """
  parts = train_config.accumulate
  num_targets = jnp.maximum(jnp.sum(batch["mask"].astype(jnp.float32)), 1)

  def loss(params, part, key):
    output = forward(model_config, params, part["tokens"], key=key,
                     execution=train_config.execution,
                     segment_ids_BT=part["segment_ids"])
    nats, _ = next_token_loss(model_config, params, output.hidden_BTD,
                              part["targets"], part["mask"],
                              train_config.z_loss,
                              train_config.execution.fsdp)
    metrics = {"loss": nats / num_targets}
    total = metrics["loss"]
    if output.router is not None:
      losses = output.router.losses
      for name, weight in train_config.balancing.weights.items():
        total += weight / parts * jnp.mean(losses[name])
      metrics["load"] = output.router.load_E / parts
      metrics["dropped"] = jnp.mean(output.router.dropped) / parts
    return total, metrics

  gradient = jax.grad(loss, has_aux=True)
  if parts == 1:
    return gradient(params, batch, key)

  def add(total, part_and_index):
    part, index = part_and_index
    new = gradient(params, part, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, total, new), None

  split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
  first = jax.tree.map(lambda x: x[0], split)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                       jax.eval_shape(gradient, params, first, key))
  return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]


def _move_biases(model_config, params, load_LE, balancing):
  params = jax.tree.map(lambda x: x, params)  # dicts of its own

  def move(moe, load):
    moe["balance_bias"] = updated_balance_bias(
        moe["balance_bias"], load, balancing.bias_rate, balancing.bias_rule)

  if "layers" in params:
    for i, load_E in enumerate(load_LE, model_config.num_dense_layers):
      move(params["layers"][str(i)]["moe"], load_E)
    return params
  for i, stack in enumerate(stacks(model_config)):
    if not stack.kinds[0].moe:
      continue
    first = stack.start - model_config.num_dense_layers
    period = len(stack.kinds)
    for j in range(period):
      move(params[f"stack_{i}"][f"layer_{j}"]["moe"],
           load_LE[first + j:first + stack.repeats * period:period])
  return params


def eval_step(model_config: ModelConfig, train_config: TrainConfig,
              params: dict, batch: dict) -> dict:
  """Sums over a batch's rows: nats and targets of each position, float32 [T];
  load [L, E] and dropped, means over the batch."""
  output = forward(model_config, params, batch["tokens"],
                   execution=train_config.eval_execution,
                   segment_ids_BT=batch["segment_ids"])
  nats_BT = token_losses(model_config, params, output.hidden_BTD,
                         batch["targets"], batch["mask"],
                         train_config.execution.fsdp)
  sums = {"nats": jnp.sum(nats_BT, 0),
          "targets": jnp.sum(batch["mask"].astype(jnp.float32), 0)}
  if output.router is not None:
    sums["load"] = output.router.load_E
    sums["dropped"] = jnp.mean(output.router.dropped)
  return sums
