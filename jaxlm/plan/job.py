"""What is planned: a model, what it does, and how it lies on a slice."""
import dataclasses
import difflib
import functools
import math
import typing

import jax

from jaxlm.config import ModelConfig
from jaxlm.model.cache import abstract_cache
from jaxlm.model.transformer import Execution, abstract_params, per_layer
from jaxlm.parallel.mesh import AXES, RULES
from jaxlm.plan.devices import Slice
from jaxlm.relayout import relayout
from jaxlm.train.step import TrainConfig, TrainState, init_state
from pallas_kernels.quant import MXFP4

TASKS = ("train", "prefill", "decode")
WEIGHTS = ("bf16", "mxfp4", "float32")
# Tokens a sequence, and sequences, or one for each device if that is more.
LENGTHS = {"train": 4096, "prefill": 8192, "decode": 8192}
BATCHES = {"train": 1, "prefill": 1, "decode": 32}


@dataclasses.dataclass(frozen=True)
class Job:
  """batch: sequences in all. seq: tokens of each; of decoding, what the cache
  holds. weights: as the program gets them. sizes: of the mesh's axes."""
  model: str
  config: ModelConfig
  task: str
  slice: Slice
  sizes: dict[str, int]
  batch: int
  seq: int
  weights: str

  @property
  def mesh_shape(self) -> dict[str, int]:
    return {axis: self.sizes.get(axis, 1) for axis in AXES}

  @property
  def batch_parts(self) -> int:
    return math.prod(self.mesh_shape[axis] for axis in RULES["batch"])

  @property
  def tokens(self) -> int:
    """That one step computes."""
    return self.batch * (1 if self.task == "decode" else self.seq)

  @property
  def expert_rows(self) -> float | None:
    """Rows that a device's experts have, if they are balanced."""
    if self.config.moe is None:
      return None
    split = self.batch_parts * self.mesh_shape["context"]
    if self.weights == "mxfp4":  # tensor splits the experts too
      split *= self.mesh_shape["tensor"]
    return self.tokens * self.config.moe.experts_per_token / split

  @property
  def execution(self) -> Execution:
    if self.task == "train":
      return Execution(dtype="bfloat16", remat="full")
    return Execution(dtype="bfloat16", scan_layers=False, fsdp=False)

  @property
  def train_config(self) -> TrainConfig:
    return TrainConfig(steps=1000, batch_size=self.batch, seq_len=self.seq,
                       execution=self.execution)


def make_job(model: str, config: ModelConfig, task: str, slice_: Slice,
             sizes: dict[str, int], batch: int | None = None,
             seq: int | None = None, weights: str | None = None) -> Job:
  """With what is not given chosen: see `LENGTHS` and `BATCHES`.

  Raises:
    ValueError: a name is unknown, or the parts do not go together.
  """
  _choice("task", task, TASKS)
  if weights is not None:
    _choice("weights", weights, WEIGHTS)
  weights = weights or ("float32" if task == "train" else "bf16")
  if (task == "train") != (weights == "float32"):
    raise ValueError(f"weights {weights!r} with task {task!r}: the trainer "
                     "keeps float32, and casts to bfloat16 as it computes; "
                     "prefill and decode take bf16 or mxfp4")
  if weights == "mxfp4" and config.moe is None:
    raise ValueError(f"weights 'mxfp4': {model} has no experts to pack")
  if math.prod(sizes.values()) != slice_.size:
    given = " x ".join(f"{k}={v}" for k, v in sizes.items())
    raise ValueError(f"mesh {given} is {math.prod(sizes.values())} devices, "
                     f"but {slice_.name} has {slice_.size}")
  parts = math.prod(sizes.get(axis, 1) for axis in RULES["batch"])
  seq = LENGTHS[task] if seq is None else seq
  if batch is None:
    batch = -(-max(BATCHES[task], slice_.size) // parts) * parts
  if batch < 1 or seq < 1:
    raise ValueError(f"batch {batch} of {seq} tokens: both must be positive")
  if batch % parts:
    raise ValueError(
        f"batch {batch} does not divide over data x expert = {parts}: use a "
        f"multiple of {parts}, or a mesh whose data x expert divides it")
  if config.max_positions and seq > config.max_positions:
    raise ValueError(f"seq {seq}: {model} has {config.max_positions} learned "
                     "positions")
  return Job(model, config, task, slice_, dict(sizes), batch, seq, weights)


def _choice(what: str, value: str, choices):
  if value not in choices:
    near = difflib.get_close_matches(value, choices, 1)
    raise ValueError(f"{what} {value!r}: " + (
        f"did you mean {near[0]!r}? " if near else "")
        + f"Use one of {', '.join(choices)}")


class State(typing.NamedTuple):
  """What lies in memory between steps: trees of ShapeDtypeStructs (or, split,
  whatever they are mapped to)."""
  parameters: typing.Any
  optimizer: typing.Any
  cache: typing.Any


def abstract_state(job: Job) -> State:
  return _abstract_state(
      job.config, job.task, job.weights, job.batch, job.seq,
      job.train_config if job.task == "train" else None)


@functools.lru_cache(64)
def _abstract_state(config, task, weights, batch, seq, train_config):
  if task == "train":
    state = jax.eval_shape(
        functools.partial(init_state, config, train_config), 0)
    return State(state.params, state.opt_state, None)
  params = jax.eval_shape(functools.partial(per_layer, config),
                          abstract_params(config))
  return State(_serving(config, params, weights), None,
               abstract_cache(config, batch, seq, "bfloat16", "tpu"))


def train_state(state: State) -> TrainState:
  return TrainState(jax.ShapeDtypeStruct((), "int32"), state.parameters,
                    state.optimizer)


def _serving(config, params, weights: str):
  """As they are loaded for a TPU: bfloat16, matrices of experts packed."""
  def visit(path, leaf):
    *_, parent, name = "", *(part.key for part in path)
    if (weights == "mxfp4" and parent == "moe"
        and name in ("gate_up", "up", "down")):
      return MXFP4(*(jax.ShapeDtypeStruct(shape, "uint8")
                     for shape in MXFP4.part_shapes(leaf.shape)))
    return jax.ShapeDtypeStruct(leaf.shape, "bfloat16")
  params = jax.tree.map_with_path(visit, params)
  return jax.eval_shape(
      lambda params: relayout(config, params, "tpu"), params)
