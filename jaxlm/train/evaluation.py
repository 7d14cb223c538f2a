"""The loss on held-out text, in nats a token and bits a byte."""
import dataclasses
import math

import jax
import numpy as np

from jaxlm.data.bundle import DataBundle
from jaxlm.data.pipeline import eval_batches
from jaxlm.model.routing import load_statistics
from jaxlm.train.programs import Programs
from jaxlm.train.step import TrainConfig


@dataclasses.dataclass(frozen=True)
class RouterLoad:
  """Over the held-out batches: load [L][E], max_vio [L], entropy [L]."""
  load: list[list[float]]
  max_vio: list[float]
  entropy: list[float]
  dropped: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """loss: nats a token. position_loss: the same of the targets at each place
  of a row, [T]; None where no row has one. router: None without expert layers.
  """
  loss: float
  bits_per_byte: float
  position_loss: list[float | None]
  router: RouterLoad | None


class Heldout:
  """The same batches at every evaluation, kept on the devices.

  Each process reads all of them, to count their bytes.
  """

  def __init__(self, programs: Programs, train_config: TrainConfig,
               data: DataBundle):
    self._programs = programs
    found = list(eval_batches(data.heldout, train_config.batch_size,
                              train_config.eval_batches))
    sizes = data.tokenizer.token_bytes()
    self._num_bytes = sum(int(sizes[batch["targets"][batch["mask"]]].sum())
                          for batch in found)
    if not self._num_bytes:
      raise ValueError("the held-out text has no byte to predict: hold more "
                       "out (heldout_fraction), or evaluate on more batches")
    self.batches = [programs.place(batch) for batch in found]

  def begin(self, params) -> dict[str, jax.Array]:
    """Sums over the batches; returns while they are being computed."""
    sums = [self._programs.evaluate(params, batch) for batch in self.batches]
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *sums)

  def finish(self, sums, num_seeds: int) -> list[Evaluation]:
    """Waits for what `begin` returned; one evaluation for each seed."""
    sums = jax.device_get(sums)
    if num_seeds == 1:
      return [self._evaluation(sums)]
    return [self._evaluation({name: value[i] for name, value in sums.items()})
            for i in range(num_seeds)]

  def _evaluation(self, sums: dict[str, np.ndarray]) -> Evaluation:
    nats_T, targets_T = (np.asarray(sums[name], np.float64)
                         for name in ("nats", "targets"))
    nats, router = float(nats_T.sum()), None
    if "load" in sums:
      load_LE = sums["load"] / len(self.batches)
      statistics = {name: value.tolist() for name, value
                    in jax.device_get(load_statistics(load_LE)).items()}
      router = RouterLoad(
          load=load_LE.tolist(), **statistics,
          dropped=float(sums["dropped"]) / len(self.batches))
    return Evaluation(
        nats / float(targets_T.sum()), nats / math.log(2) / self._num_bytes,
        [float(nats / targets) if targets else None
         for nats, targets in zip(nats_T, targets_T)], router)
