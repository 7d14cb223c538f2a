"""What a job costs one device, by arithmetic alone.

What lies in memory between steps is counted leaf by leaf and exact. The
temporaries, the traffic between devices and the FLOPs computed twice follow
the program as it is written; tests hold them against compiled ones.
"""
import dataclasses
import functools
import math

import jax

from jaxlm.config import MLAConfig
from jaxlm.model.cache import cache_slots
from jaxlm.model.costs import Flops, flops_per_token
from jaxlm.parallel.mesh import RULES
from jaxlm.parallel.params import logical_axes
from jaxlm.parallel.schemes import SHARES, choose_scheme
from jaxlm.model.transformer import abstract_params, stacks
from jaxlm.plan import programs
from jaxlm.plan.job import Job
from jaxlm.train.loss import CHUNK_LOGITS

# Of activations, and of weights as they are gathered.
ITEM = 2
# Of the program: a layer's, and the kernels and exchanges of experts.
CODE, EXPERT_CODE = 20e6, 120e6


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one device. state: bytes by kind. wire: bytes received, by (axes, kind).
  useful, executed: FLOPs."""
  state: dict[str, int]
  temporaries: float
  wire: dict[tuple[str, str], float]
  useful: float
  executed: float

  @property
  def total(self) -> float:
    return sum(self.state.values()) + self.temporaries


def estimate(job: Job) -> Estimate:
  """Raises ValueError if something does not divide over the mesh."""
  state = programs.bytes_by_kind(job, programs.abstract_mesh(job.sizes))
  shapes = Shapes(job)
  return Estimate(state, shapes.temporaries(), shapes.wire(),
                  useful_flops(job) / job.slice.size,
                  executed_flops(job) / job.slice.size)


def useful_flops(job: Job) -> float:
  """Of the whole step: matmuls of active parameters, and of the keys seen."""
  return job.tokens * _flops(job).total


def _flops(job: Job) -> Flops:
  """A token, while decoding over a full cache."""
  flops = flops_per_token(job.config, job.seq, job.task == "train")
  if job.task != "decode":
    return flops
  a = job.config.attention
  if isinstance(a, MLAConfig):
    each = 2 * a.kv_rank + a.rope_head_dim
  else:
    each = 2 * a.head_dim
  keys = sum(cache_slots(job.config, layer.attention, job.seq)
             for layer in job.config.layers)
  return dataclasses.replace(flops,
                             attention_scores=2 * a.num_heads * each * keys)


def executed_flops(job: Job) -> float:
  """With what the backward pass computes again: all of a layer but its last
  matmul, whose result nothing needs; and attention's scores once more."""
  flops, tokens = _flops(job), job.tokens
  if job.task != "train":
    # Prefill computes the logits of the last tokens alone.
    unembedding = flops.unembedding * (
        job.batch if job.task == "prefill" else tokens)
    return tokens * (flops.total - flops.unembedding) + unembedding
  def again(mlp):
    return 1 + (2 / 9 if mlp is None or mlp.gated else 1 / 6)
  config = job.config
  expert = config.moe and config.moe.expert
  return tokens * (
      4 / 3 * (flops.attention_projections + flops.router)
      + 3 / 2 * flops.attention_scores + flops.unembedding
      + again(config.mlp) * flops.mlp + again(expert) * flops.experts)


@functools.lru_cache
def _weights(config) -> dict[str, float]:
  """Parameters by how they are split: those of routed experts, the largest
  layer's of these, other matrices, the largest layer's, and tables."""
  shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree.leaves_with_path(
                abstract_params(config))}
  found = dict.fromkeys(("experts", "expert_layer", "others", "other_layer",
                         "unembedding"), 0.0)
  layers = {}
  for name, axes in logical_axes(config).items():
    size = math.prod(shapes[name])
    kind = "experts" if "expert" in axes else "others"
    if name.endswith(("embed/embedding", "embed/positions")):
      found["unembedding"] += size * config.tie_embeddings
    elif name == "unembedding":
      found["unembedding"] += size
    elif "embed" in axes or "expert_embed" in axes:
      found[kind] += size
      repeats = shapes[name][0] if name.startswith("stack_") else 1
      key = name.rpartition("/layer_")[0], name.split("/")[1], kind
      layers[key] = layers.get(key, 0.0) + size / repeats
  for (_, _, kind), size in layers.items():
    name = "expert_layer" if kind == "experts" else "other_layer"
    found[name] = max(found[name], size)
  return found


class Shapes:
  """A job's sizes on one device."""

  def __init__(self, job: Job):
    self.job, self.config, mesh = job, job.config, job.mesh_shape
    self.mesh = mesh
    self.fsdp = math.prod(mesh[axis] for axis in RULES["embed"])
    self.expert_fsdp = math.prod(mesh[axis] for axis in RULES["expert_embed"])
    self.tokens = job.tokens / job.batch_parts / mesh["context"]
    self.row = job.config.d_model * ITEM
    self.weights = _weights(job.config)
    self.num_moe = sum(layer.moe for layer in job.config.layers)

  def temporaries(self) -> float:
    return {"train": self._training, "prefill": self._prefill,
            "decode": self._decoding}[self.job.task]()

  def _layer(self) -> float:
    """Bytes of one layer's activations at their peak, forward."""
    a, rows = self.config.attention, self.tokens
    tensor = self.mesh["tensor"]
    attention = rows * ITEM * 2 * a.num_heads * (
        a.head_dim + a.v_head_dim) / tensor
    feed = rows * ITEM * 4 * self.config.mlp.d_ff / tensor if (
        self.config.mlp) else 0
    return 4 * rows * self.row + max(attention, feed, self._routed(2))

  def _routed(self, arrays: int) -> float:
    """Bytes of so many float32 arrays of what experts activate, with a round's
    room."""
    moe = self.config.moe
    if moe is None:
      return 0
    return (arrays * 4 * SHARES * self.tokens * moe.experts_per_token
            * 2 * moe.expert.d_ff / self.mesh["tensor"])

  def _gathered(self) -> float:
    """Bytes of a layer's weights, gathered over the axes of the batch."""
    return ITEM * (self.weights["other_layer"]
                   + self.weights["expert_layer"] / self.mesh["expert"]
                   ) / self.mesh["tensor"]

  def _training(self) -> float:
    config, mesh = self.config, self.mesh
    weights, tensor = self.weights, mesh["tensor"]
    kept = (config.num_layers + 2) * self.tokens * self.row
    # All of this device's parts, in the dtype they are used in, at once.
    parts = ITEM / tensor * (
        weights["others"] / self.fsdp
        + weights["experts"] / mesh["expert"] / self.expert_fsdp)
    # The table, its gradient as it is summed in float32, and then as it is
    # sent, when the logits are gone.
    table = config.vocab_size * config.d_model / tensor
    loss = (4 + ITEM) * table + max(ITEM * table, 4 * 4 * CHUNK_LOGITS)
    # Then the layers', float32, and one layer, weights of the next, gradients.
    layer = max(1.5 * self._layer(), self._routed(7)) + 3 * self._gathered()
    return kept + parts + max(loss, 4 / ITEM * parts + layer) + self._code()

  def _code(self) -> float:
    """Bytes of the program: each kind of layer once."""
    layers = sum(len(stack.kinds) for stack in stacks(self.config))
    return layers * CODE + (EXPERT_CODE if self.config.moe else 0)

  def _prefill(self) -> float:
    return self._layer() + 2 * self.tokens * self.row

  def _decoding(self) -> float:
    words = self.config.vocab_size / self.mesh["tensor"]
    rows = self.job.batch / self.job.batch_parts
    return 3 * rows * words * 4 + 8 * self._layer() + self._code()

  def wire(self) -> dict[tuple[str, str], float]:
    found = {}
    def add(axes, kind, nbytes):
      axes = "+".join(axis for axis in axes if self.mesh[axis] > 1)
      if axes and nbytes:
        found[axes, kind] = found.get((axes, kind), 0.0) + nbytes
    if self.job.task == "train":
      self._weights_wire(add)
    self._activations_wire(add)
    return found

  def _weights_wire(self, add):
    """Gathered forward and again backward, then their gradients scattered."""
    tensor = self.mesh["tensor"]
    for axes, parts, layers, once in (
        (RULES["embed"], self.fsdp, self.weights["others"],
         self.weights["unembedding"]),
        (RULES["expert_embed"], self.expert_fsdp,
         self.weights["experts"] / self.mesh["expert"], 0)):
      share = ITEM * (parts - 1) / parts / tensor
      add(axes, "all-gather", (2 * layers + once) * share)
      add(axes, "reduce-scatter", (layers + once) * share)

  def _scheme(self) -> str:
    device = self.job.slice.device
    return choose_scheme(
        self.tokens, self.config.moe.experts_per_token, self.mesh["expert"],
        platform="tpu" if device.torus else "gpu",
        generation="7x" if device.name == "v7x" else device.name)

  def _activations_wire(self, add):
    mesh, x = self.mesh, self.tokens * self.row
    train = self.job.task == "train"
    expert, tensor = mesh["expert"], mesh["tensor"]
    if self.config.moe and expert > 1:
      per_token = self.config.moe.experts_per_token
      gathered = self._scheme() == "gather"
      if gathered:
        add(("expert",), "all-gather",
            self.num_moe * (3 if train else 1) * x * (expert - 1))
        add(("expert",), "reduce-scatter",
            self.num_moe * (2 if train else 1) * x * (expert - 1))
      else:
        add(("expert",), "ragged-all-to-all", self.num_moe * (
            5 if train else 2) * x * per_token * (expert - 1) / expert)
    add(("tensor",), "all-reduce", self.config.num_layers
        * (5 if train else 2) * 2 * x * (tensor - 1) / tensor)
    a = self.config.attention
    kv = self.tokens * ITEM * a.num_heads * a.head_dim if isinstance(
        a, MLAConfig) else self.tokens * ITEM * 2 * (
            a.num_kv_heads * a.head_dim)
    add(("context",), "collective-permute", self.config.num_layers
        * (4 if train else 1) * kv * (mesh["context"] - 1))
