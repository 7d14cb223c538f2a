"""The compiled functions of a run, and what they are fed."""
import contextlib
import functools
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.packing import Batch, Rows
from jaxlm.data.pipeline import batches
from jaxlm.parallel import multihost
from jaxlm.parallel.mesh import named_sharding
from jaxlm.parallel.multihost import in_order
from jaxlm.parallel.params import shardings, with_shardings
from jaxlm.train.step import TrainConfig, eval_step, init_state, train_step


class Programs:
  """Init, step and evaluation of one seed, or of several under vmap.

  With several seeds the state, the training batches and all metrics have a
  leading axis of that length. Seeds are arguments: whoever trains the same
  model in the same way with other seeds shares what was compiled.

  With a mesh, of one seed, the state is split over it from the first, and so
  are the batches; metrics are whole on each device. `local_rows` are those of
  a batch that this process reads (None: all).
  """

  def __init__(self, model_config: ModelConfig, train_config: TrainConfig,
               seeds: tuple[int, ...], mesh: Mesh | None = None):
    several = len(seeds) > 1
    self._seeds = np.asarray(seeds if several else seeds[0], np.uint32)
    self._shared = _shared(model_config, train_config,
                           len(seeds) if several else None, mesh)
    self.abstract_state = self._shared.abstract_state
    self.local_rows = self._shared.local_rows
    self.tokens_per_step = (len(seeds) * train_config.batch_size
                            * train_config.seq_len)

  def init(self):
    with self._shared.under_mesh():
      init = self._shared.init
      if multihost.is_several():
        init = init.lower(self._seeds).compile()
        multihost.meet()
      return in_order(init(self._seeds))

  def step(self, state, batch: Batch):
    """The next state and metrics; `state` is donated. The batch has the
    `local_rows` alone."""
    with self._shared.under_mesh():
      return in_order(self._shared.step(
          state, self._shared.place(batch, self.local_rows), self._seeds))

  def place(self, batch: Batch):
    """A whole batch as `evaluate` takes it, on the devices."""
    return self._shared.place(batch, None)

  def evaluate(self, params, batch):
    with self._shared.under_mesh():
      return in_order(self._shared.evaluate(params, batch))

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
def _shared(model_config, train_config, num_seeds, mesh):
  return _Shared(model_config, train_config, num_seeds, mesh)


class _Shared:
  """Compiled functions; `num_seeds` None is one seed without vmap."""

  def __init__(self, model_config, train_config, num_seeds, mesh):
    init, step, evaluate = (
        functools.partial(function, model_config, train_config)
        for function in (init_state, train_step, eval_step))
    if num_seeds is not None:
      init, step = jax.vmap(init), jax.vmap(step)
      evaluate = jax.vmap(evaluate, in_axes=(0, None))
    self._axes = () if num_seeds is None else (num_seeds,)
    self._batch_shape = train_config.batch_size, train_config.seq_len
    self._seeds = jax.ShapeDtypeStruct(self._axes, np.uint32)
    self._mesh, self._batch_sharding, self.local_rows = mesh, None, None
    state, whole = jax.eval_shape(init, self._seeds), None
    if mesh is None:
      device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      states, of_state = jax.tree.map(lambda _: device, state), None
    else:
      whole = NamedSharding(mesh, P())
      of_state = states = shardings(model_config, state, mesh,
                                    train_config.execution.fsdp)
      self._split_batches()
    self.abstract_state = with_shardings(state, states)
    # Its many small random arrays take long to compile and run once.
    self.init = jax.jit(init, out_shardings=of_state, compiler_options={
        "xla_backend_optimization_level": 1})
    self.step = jax.jit(step, donate_argnums=0,
                        out_shardings=mesh and (of_state, whole))
    self.evaluate = jax.jit(evaluate, out_shardings=whole)

  def _split_batches(self):
    self._batch_sharding = named_sharding(
        self._mesh, "a batch", self._batch_shape, ("batch", "length"))
    parts = self._batch_sharding.addressable_devices_indices_map(
        self._batch_shape).values()
    numbers = np.arange(self._batch_shape[0])
    self.local_rows = np.unique(np.concatenate(
        [numbers[rows] for rows, _ in parts])).tolist()

  def under_mesh(self):
    return (jax.set_mesh(self._mesh) if self._mesh is not None
            else contextlib.nullcontext())

  def place(self, batch: Batch, rows: Sequence[int] | None):
    """Arrays over all processes, of which this one has these rows."""
    if self._mesh is None:
      return jax.device_put(batch)
    numbers = np.arange(self._batch_shape[0])
    rows = numbers if rows is None else np.asarray(rows)

    def split(x):
      return jax.make_array_from_callback(
          self._batch_shape, self._batch_sharding, lambda index:
          x[np.searchsorted(rows, numbers[index[0]])][:, index[1]])
    return {name: split(x) for name, x in batch.items()}

  @functools.cached_property
  def compiled(self) -> jax.stages.Compiled:
    """Replaces step and evaluate by compiled ones; returns the step."""
    def batch(*axes):
      whole = jax.ShapeDtypeStruct((*axes, *self._batch_shape), np.int32,
                                   sharding=self._batch_sharding)
      return {"tokens": whole, "targets": whole, "segment_ids": whole,
              "mask": whole.update(dtype=bool)}
    with self.under_mesh():
      self.step = self.step.lower(
          self.abstract_state, batch(*self._axes), self._seeds).compile()
      self.evaluate = self.evaluate.lower(
          self.abstract_state.params, batch()).compile()
    multihost.meet()
    return self.step


class SeedBatches:
  """Each seed's own batches, stacked when there are several."""

  def __init__(self, rows: Rows, batch_size: int, seeds: tuple[int, ...],
               local_rows: Sequence[int] | None = None):
    self._iterators = [batches(rows, batch_size, seed, local_rows=local_rows)
                       for seed in seeds]

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
