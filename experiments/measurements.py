"""What is measured of a run's final parameters, besides its held-out loss."""
import collections
from collections.abc import Sequence
import dataclasses
import itertools

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data import DataBundle
from jaxlm.data.pipeline import eval_batches
from jaxlm.model.trace import trace
from jaxlm.train import TrainConfig, TrainResult
from jaxlm.train.evaluation import Heldout
from jaxlm.train.programs import Programs

# How much longer than in training the rows of "long_loss" are.
LONGER = 4
# The first so many positions have hardly any key to choose from.
EARLY = 32
# Attention is looked at in so many batches at most.
TRACED_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Measured:
  """values: numbers, by the name of a metric in `experiments.claims`. series:
  by name, points (x, y)."""
  values: dict[str, float] = dataclasses.field(default_factory=dict)
  series: dict[str, list[tuple[float, float]]] = dataclasses.field(
      default_factory=dict)


def measure(names: Sequence[str], model: ModelConfig, config: TrainConfig,
            data: DataBundle, result: TrainResult) -> Measured:
  """Takes the MEASUREMENTS named.

  Raises:
    ValueError: one of them is unknown.
  """
  check(names)
  values, series = {}, {}
  for name in names:
    found = MEASUREMENTS[name](model, config, data, result)
    values |= found.values
    series |= found.series
  return Measured(values, series)


def check(names: Sequence[str]) -> None:
  if unknown := set(names) - set(MEASUREMENTS):
    raise ValueError(f"measurements {sorted(unknown)} are unknown: use some of "
                     f"{sorted(MEASUREMENTS)}")


def buckets(loss_T: Sequence[float | None]
            ) -> list[tuple[float, float]]:
  """(position, mean loss) over positions that double in number."""
  points, start = [], 0
  for end in (2 ** i for i in itertools.count(2)):
    part = [loss for loss in loss_T[start:end] if loss is not None]
    if part:
      points.append(((start + min(end, len(loss_T))) / 2, float(np.mean(part))))
    start = end
    if start >= len(loss_T):
      return points


def _by_position(model, config, data, result):
  """The loss by position, and that of the last quarter of the sequence."""
  loss_T = result.position_loss
  late = [loss for loss in loss_T[3 * len(loss_T) // 4:] if loss is not None]
  return Measured({"late_loss": float(np.mean(late))},
                  {"loss by position": buckets(loss_T)})


def _long(model, config, data, result):
  """The loss past the length of training, in rows LONGER times as long."""
  longer = dataclasses.replace(
      config, seq_len=LONGER * config.seq_len,
      batch_size=max(1, config.batch_size // LONGER))
  rows = dataclasses.replace(
      data, heldout=dataclasses.replace(data.heldout, seq_len=longer.seq_len))
  heldout = Heldout(Programs(model, longer, (result.seed,)), longer, rows)
  loss_T, = (found.position_loss for found in heldout.finish(
      heldout.begin(result.params), 1))
  past = [loss for loss in loss_T[config.seq_len:] if loss is not None]
  return Measured({"long_loss": float(np.mean(past))},
                  {"loss in longer rows": buckets(loss_T)})


def _first_token(model, config, data, result):
  """How much attention the first key of a row gets, and the sink if there are
  any, in full layers, from the EARLY'th query on."""
  full = [i for i, kind in enumerate(model.layers) if kind.attention == "full"]
  shares = collections.defaultdict(list)
  for batch in itertools.islice(eval_batches(
      data.heldout, config.batch_size, config.eval_batches), TRACED_BATCHES):
    found = trace(model, result.params, batch["tokens"], parts=("attention",),
                  execution=config.execution,
                  segment_ids_BT=batch["segment_ids"])
    for name, share_LBTN in (("first_token_mass", found.first_key_LBTN),
                             ("sink_mass", found.sink_LBTN)):
      if share_LBTN is not None:
        shares[name].append(np.asarray(share_LBTN)[full, :, EARLY:].mean())
  return Measured({name: float(np.mean(found))
                   for name, found in shares.items()})


MEASUREMENTS = {"by_position": _by_position, "long": _long,
                "first_token": _first_token}
