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
  leading axis of that length. Seeds are arguments: whoever trains the same
  model in the same way with other seeds shares what was compiled.
  """

  def __init__(self, model_config: ModelConfig, train_config: TrainConfig,
               seeds: tuple[int, ...]):
    several = len(seeds) > 1
    self._seeds = np.asarray(seeds if several else seeds[0], np.uint32)
    self._shared = _shared(model_config, train_config,
                           len(seeds) if several else None)
    self.abstract_state = self._shared.abstract_state
    self.tokens_per_step = (len(seeds) * train_config.batch_size
                            * train_config.seq_len)

  def init(self):
    return self._shared.init(self._seeds)

  def step(self, state, batch: Batch):
    """The next state and metrics; `state` is donated."""
    return self._shared.step(state, batch, self._seeds)

  def evaluate(self, params, batch: Batch):
    return self._shared.evaluate(params, batch)

  def compile(self) -> None:
    """Now, so that the first step takes no longer than the others."""
    self._shared.compiled

  @property
  def peak_memory_bytes(self) -> int:
    """That a step needs at once, as the compiler counts: arguments, results
    and temporaries; a result in the place of an argument counts once."""
    memory = self._shared.compiled.memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes
            + memory.temp_size_in_bytes - memory.alias_size_in_bytes)


@functools.lru_cache(maxsize=32)
def _shared(model_config, train_config, num_seeds):
  return _Shared(model_config, train_config, num_seeds)


class _Shared:
  """Compiled functions; `num_seeds` None is one seed without vmap."""

  def __init__(self, model_config, train_config, num_seeds):
    init, step, evaluate = (
        functools.partial(function, model_config, train_config)
        for function in (init_state, train_step, eval_step))
    if num_seeds is not None:
      init, step = jax.vmap(init), jax.vmap(step)
      evaluate = jax.vmap(evaluate, in_axes=(0, None))
    # Its many small random arrays take long to compile and run once.
    self.init = jax.jit(init, compiler_options={
        "xla_backend_optimization_level": 1})
    self.step = jax.jit(step, donate_argnums=0)
    self.evaluate = jax.jit(evaluate)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    axes = () if num_seeds is None else (num_seeds,)
    self._seeds = jax.ShapeDtypeStruct(axes, np.uint32)
    self.abstract_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init, self._seeds))
    self._axes = axes
    self._batch_shape = train_config.batch_size, train_config.seq_len

  @functools.cached_property
  def compiled(self) -> jax.stages.Compiled:
    """Replaces step and evaluate by compiled ones; returns the step."""
    def batch(*axes):
      shape = *axes, *self._batch_shape
      whole = jax.ShapeDtypeStruct(shape, np.int32)
      return {"tokens": whole, "targets": whole, "segment_ids": whole,
              "mask": jax.ShapeDtypeStruct(shape, bool)}
    self.step = self.step.lower(
        self.abstract_state, batch(*self._axes), self._seeds).compile()
    self.evaluate = self.evaluate.lower(
        self.abstract_state.params, batch()).compile()
    return self.step


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
