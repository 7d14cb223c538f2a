"""The compiled functions of a run, and what they are fed."""
import functools

import jax
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
    # Its many small random arrays take long to compile and run once.
    self._init = jax.jit(init, compiler_options={
        "xla_backend_optimization_level": 1})
    self._step = jax.jit(step, donate_argnums=0)
    self._evaluate = jax.jit(evaluate)
    self.tokens_per_step = (len(seeds) * train_config.batch_size
                            * train_config.seq_len)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    self.abstract_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init, self._seeds))

  def init(self):
    return self._init(self._seeds)

  def step(self, state, batch: Batch):
    """The next state and metrics; `state` is donated."""
    return self._step(state, batch, self._seeds)

  def evaluate(self, params, batch: Batch):
    return self._evaluate(params, batch)

  def compile(self, heldout: Batch) -> None:
    """Now, so that the first step takes no longer than the others.

    `heldout` is a batch to evaluate on; training batches are alike.
    """
    batch = {name: jax.ShapeDtypeStruct((*self._seeds.shape, *x.shape), x.dtype)
             for name, x in heldout.items()}
    self._step = self._step.lower(self.abstract_state, batch,
                                  self._seeds).compile()
    self._evaluate = self._evaluate.lower(self.abstract_state.params,
                                          heldout).compile()


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
