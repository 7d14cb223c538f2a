"""The compiled functions of a run, and what they are fed."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.packing import Batch, Rows
from jaxlm.data.pipeline import batches
from jaxlm.train.step import TrainConfig, eval_step, init_state, train_step


class Programs:
  """Init, step and evaluation of one seed, or of several under vmap.

  With several seeds the state, the training batches and all metrics have a
  leading axis of that length.
  """

  def __init__(self, model_config: ModelConfig, train_config: TrainConfig,
               seeds: tuple[int, ...]):
    several = len(seeds) > 1
    self._seeds = np.asarray(seeds if several else seeds[0], np.uint32)
    init, step, evaluate = (
        functools.partial(function, model_config, train_config)
        for function in (init_state, train_step, eval_step))
    if several:
      init, step = jax.vmap(init), jax.vmap(step)
      evaluate = jax.vmap(evaluate, in_axes=(0, None))
    self._init, self._evaluate = jax.jit(init), jax.jit(evaluate)
    self._step = jax.jit(step, donate_argnums=0)
    shape = (*self._seeds.shape, train_config.batch_size, train_config.seq_len)
    self._abstract_batch = {
        "mask": jax.ShapeDtypeStruct(shape, bool),
        **dict.fromkeys(("tokens", "targets", "segment_ids"),
                        jax.ShapeDtypeStruct(shape, jnp.int32))}
    self.tokens_per_step = int(np.prod(shape))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    self.abstract_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init, self._seeds))

  def init(self):
    return self._init(self._seeds)

  @functools.cached_property
  def compiled_step(self):
    return self._step.lower(self.abstract_state, self._abstract_batch,
                            self._seeds).compile()

  def step(self, state, batch: Batch):
    """The next state and metrics; `state` is donated."""
    return self.compiled_step(state, batch, self._seeds)

  def evaluate(self, params, batch: Batch):
    return self._evaluate(params, batch)


class SeedBatches:
  """Each seed's own batches, stacked when there are several."""

  def __init__(self, rows: Rows, batch_size: int, seeds: tuple[int, ...]):
    self._iterators = [batches(rows, batch_size, seed) for seed in seeds]

  def __next__(self) -> Batch:
    parts = [next(iterator) for iterator in self._iterators]
    if len(parts) == 1:
      return parts[0]
    return {name: np.stack([part[name] for part in parts])
            for name in parts[0]}

  def get_state(self) -> list[dict]:
    return [iterator.get_state() for iterator in self._iterators]

  def set_state(self, states: list[dict]) -> None:
    for iterator, state in zip(self._iterators, states, strict=True):
      iterator.set_state(state)
