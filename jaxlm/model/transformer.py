"""The decoder, as pure functions of (config, params, tokens).

Parameters are a nested dict of float32 arrays:

  embed   embedding [V, D] and, for GPT-2, positions [max_positions, D]
  stack_0, stack_1, ...   runs of layers (`jaxlm.config.stacks`), each a dict
    layer_0, layer_1, ...   of the layers of its period, whose leaves have the
    number of repeats in front
  final_norm   unembedding [D, V] (not tied)

A program that runs layers one after the other rather than scanned does better
with `per_layer` parameters: layers {"0": ..., "1": ...} in place of the stacks,
so that no layer's weights are sliced out of a stack, nor their gradients put
back. Every function here takes either form.
"""
import dataclasses
import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.config import LayerKind, MLAConfig, ModelConfig, Stack, stacks
from jaxlm.model import simulated
from jaxlm.model.attention import Attention
from jaxlm.model.cache import Cache
from jaxlm.model.layers import Norm, dropout, fan_in, soft_cap, weight
from jaxlm.model.mla import MLA
from jaxlm.model.mlp import MLP
from jaxlm.model.moe import MoE
from jaxlm.model.rope import RopeTable, rope_table
from jaxlm.model.routing import RouterOutput
from jaxlm.parallel.dispatch import ARRIVED
from jaxlm.parallel.schemes import SCHEMES
from jaxlm.parallel import pipeline
from jaxlm.parallel.mesh import (axis_size, check_divides, current, shard,
                                 spec, unset)
from jaxlm.parallel.vocabulary import lookup, project

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "arrived": jax.checkpoint_policies.save_only_these_names(ARRIVED),
}


# The logical axes of hidden states.
TOKENS = ("batch", "length", None)


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a model is run; none of it but `simulate` changes what it computes.

  dtype: of activations. remat: what the backward pass computes again: "none",
  "dots" (all but matmuls), "full" (whole layers) or "arrived" (the same, but
  rows that experts were sent under a mesh are kept). scan_layers: one program
  for all layers of a run (quick to compile), or one for each (faster on the
  CPU). attention, experts: the implementations of `pallas_kernels`' two
  operations.

  simulate: numbers of few bits, to train or to evaluate with. Values are
  rounded to them in the forward pass, gradients go straight through to the
  parameters, and matmuls are of floats as always.
    "mxfp4_experts": the matrices of experts, as `MXFP4.quantize` rounds them.
      The model computes what it does with these experts quantized.
    "fp8": what linear layers multiply, in the backward pass too, all but the
      router and the unembedding: FP8 training after arXiv 2412.19437, section
      3.3, see `simulated.fp8_matmul`.

  Under a mesh: fsdp says that weights are split over the axes of the batch
  too, and gathered as they are used (else they stay, as decoding wants).
  dispatch says how tokens get to the devices of their experts: one of
  `jaxlm.parallel.schemes.SCHEMES`, or "auto" for the one that should be
  quickest. Only "capacity" drops anything: what an expert is sent beyond
  `capacity_factor` times an equal share, by each device. microbatches: in how
  many a batch goes through stages, if any; 0 takes up to four for each.
  """
  dtype: str = "float32"
  remat: str = "none"
  scan_layers: bool = True
  attention: str = "auto"
  experts: str = "auto"
  fsdp: bool = True
  dispatch: str = "auto"
  capacity_factor: float = 1.25
  microbatches: int = 0
  simulate: str = "none"

  def __post_init__(self):
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"remat={self.remat!r}: use one of "
                       f"{tuple(REMAT_POLICIES)}")
    if self.dtype not in ("float32", "bfloat16", "float16"):
      raise ValueError(f"dtype={self.dtype!r}: use 'float32', 'bfloat16' or "
                       "'float16'")
    if self.dispatch not in ("auto", *SCHEMES):
      raise ValueError(f"dispatch={self.dispatch!r}: use one of "
                       f"{('auto', *SCHEMES)}")
    if not self.capacity_factor > 0:
      raise ValueError(f"capacity_factor={self.capacity_factor}: must be "
                       "positive")
    if self.simulate not in simulated.SIMULATIONS:
      raise ValueError(f"simulate={self.simulate!r}: use one of "
                       f"{simulated.SIMULATIONS}")

  @property
  def fp8(self) -> bool:
    return self.simulate == "fp8"


class Context(typing.NamedTuple):
  """What every layer sees. `key` is there while training only."""
  rope: dict[str, RopeTable | None]
  positions_BT: jax.Array
  segment_ids_BT: jax.Array | None
  key: jax.Array | None


class Output(typing.NamedTuple):
  """The last hidden states, normalised, and for expert layers their router's
  report, with the number of such layers in front (None without)."""
  hidden_BTD: jax.Array
  router: RouterOutput | None


class Layer(nn.Module):
  """Attention and feed-forward, each with norms and a residual."""
  config: ModelConfig
  kind: LayerKind
  execution: Execution

  @nn.compact
  def __call__(self, x_BTD, index, context: Context, cache=None):
    config, execution = self.config, self.execution
    residual_scale = (2 * config.num_layers) ** -0.5
    keys = [None] * 3
    if context.key is not None:
      keys = jax.random.split(jax.random.fold_in(context.key, index), 3)

    def norm(x, name, *placements):
      """x itself where norms are placed elsewhere."""
      if config.norm.placement not in placements:
        return x
      return Norm(config.norm, name=name)(x)

    def add(x, y, name, key):
      y = dropout(norm(y, name, "pre_and_post"), config.dropout, key)
      return shard(norm(x + y, name, "post"), *TOKENS)

    read = "pre", "pre_and_post"
    y, cache = self._attention(residual_scale)(
        norm(x_BTD, "attention_norm", *read), context, cache)
    x_BTD = add(x_BTD, y, "attention_post_norm", keys[0])
    y, router = norm(x_BTD, "mlp_norm", *read), None
    if self.kind.moe:
      y, router = MoE(config.moe, residual_scale, execution.experts,
                      execution.dispatch, execution.capacity_factor,
                      execution.fsdp, execution.fp8, name="moe")(y, keys[2])
    else:
      y = MLP(config.mlp, residual_scale, execution.fsdp, execution.fp8,
              name="mlp")(y)
    return add(x_BTD, y, "mlp_post_norm", keys[1]), router, cache

  def _attention(self, residual_scale):
    config, execution = self.config, self.execution
    if isinstance(config.attention, MLAConfig):
      return MLA(config.attention, residual_scale, execution.attention,
                 execution.fsdp, execution.fp8, name="attention")
    return Attention(config.attention, self.kind.attention, config.norm,
                     residual_scale, execution.attention, execution.fsdp,
                     execution.fp8, name="attention")


class Period(nn.Module):
  """One repeat of a stack: its kinds of layer, one after the other."""
  config: ModelConfig
  kinds: tuple[LayerKind, ...]
  execution: Execution

  @nn.compact
  def __call__(self, x_BTD, index, context: Context):
    routers = []
    for i, kind in enumerate(self.kinds):
      layer = Layer
      if self.execution.remat != "none":
        layer = nn.remat(Layer, prevent_cse=False,
                         policy=REMAT_POLICIES[self.execution.remat])
      x_BTD, router, _ = layer(self.config, kind, self.execution,
                               name=f"layer_{i}")(x_BTD, index + i, context)
      if router is not None:
        routers.append(router)
    return x_BTD, routers


class Decoder(nn.Module):
  config: ModelConfig
  execution: Execution

  @nn.compact
  def __call__(self, tokens_BT, context: Context) -> Output:
    config = self.config
    x_BTD = Embedding(config, self.execution, name="embed")(tokens_BT, context)
    routers = []
    for i, stack in enumerate(stacks(config)):
      x_BTD, stacked = self._stack(f"stack_{i}", stack)(
          x_BTD, stack.start + len(stack.kinds) * jnp.arange(stack.repeats),
          context)
      if stacked:
        routers.append(jax.tree.map(_interleave, *stacked))
    hidden_BTD = Norm(config.norm, name="final_norm")(x_BTD)
    if self.is_initializing() and not config.tie_embeddings:
      weight(self, "unembedding", (config.d_model, config.vocab_size),
             ("embed", "vocab"), fan_in())
    router = (jax.tree.map(lambda *x: jnp.concatenate(x), *routers)
              if routers else None)
    return Output(hidden_BTD, router)

  def _stack(self, name: str, stack: Stack):
    return nn.scan(
        Period, variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=(0, nn.broadcast), length=stack.repeats,
        metadata_params={nn.PARTITION_NAME: "layers"})(
            self.config, stack.kinds, self.execution, name=name)


def _interleave(*of_each_kind):
  """[repeats, ...] of each kind of a period, in the order of the layers."""
  x = jnp.stack(of_each_kind, 1)
  return x.reshape(-1, *x.shape[2:])


class Embedding(nn.Module):
  """Tokens, and learned positions if any, to [B, T, D]."""
  config: ModelConfig
  execution: Execution

  @nn.compact
  def __call__(self, tokens_BT, context: Context):
    config, dtype = self.config, jnp.dtype(self.execution.dtype)
    normal = nn.initializers.normal(
        config.d_model ** -0.5 if config.scale_embeddings else 0.02)
    table = weight(self, "embedding", (config.vocab_size, config.d_model),
                   ("vocab", "embed"), normal)
    x_BTD = lookup(table, tokens_BT, dtype, self.execution.fsdp)
    if config.scale_embeddings:
      x_BTD *= jnp.sqrt(jnp.float32(config.d_model)).astype(dtype)
    if config.max_positions:
      positions = weight(self, "positions",
                         (config.max_positions, config.d_model),
                         ("positions", "embed"), nn.initializers.normal(0.02))
      x_BTD += shard(positions[context.positions_BT].astype(dtype), *TOKENS)
    key = context.key
    if key is not None:
      key = jax.random.fold_in(key, config.num_layers)
    return dropout(x_BTD, config.dropout, key)


def make_context(config: ModelConfig, tokens_BT, positions_BT=None,
                 segment_ids_BT=None, key=None) -> Context:
  attention = config.attention
  if positions_BT is None:
    if config.max_positions and tokens_BT.shape[1] > config.max_positions:
      raise ValueError(f"{tokens_BT.shape[1]} tokens, but the model has "
                       f"{config.max_positions} learned positions")
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
  if isinstance(attention, MLAConfig):
    rope = {"full": rope_table(attention.rope, attention.rope_head_dim,
                               positions_BT)}
  else:
    rope = {kind: rope_table(config_, attention.head_dim, positions_BT)
            for kind, config_ in (("full", attention.rope_full),
                                  ("sliding", attention.rope_sliding))}
  positions_BT = jnp.broadcast_to(positions_BT, tokens_BT.shape)
  if current() is not None:
    check_divides("tokens_BT", tokens_BT.shape, TOKENS[:2], current())
  return Context(rope, positions_BT, segment_ids_BT, key)


def init_variables(config: ModelConfig, key):
  """Initial parameters, boxed with the logical axes of each."""
  tokens_BT = jnp.zeros((1, 1), jnp.int32)
  # Only shapes matter here: these implementations are the quickest to trace.
  execution = Execution(attention="reference", experts="ragged")
  with unset():  # one token does not divide over a mesh
    return Decoder(config, execution).init(
        key, tokens_BT, make_context(config, tokens_BT))["params"]


def init_params(config: ModelConfig, key) -> dict:
  """Initial parameters, float32.

  Matrices are normal with variance 1 / fan-in, those that write into the
  residual stream also divided by twice the number of layers; embeddings have
  standard deviation 0.02 (of tokens d_model^-0.5 when they are scaled).
  """
  return nn.unbox(init_variables(config, key))


def abstract_params(config: ModelConfig) -> dict:
  """The tree of `init_params` as ShapeDtypeStructs, nothing computed."""
  return jax.eval_shape(functools.partial(init_params, config),
                        jax.random.key(0))


def forward(config: ModelConfig, params: dict, tokens_BT, *,
            execution: Execution = Execution(), positions_BT=None,
            segment_ids_BT=None, key=None) -> Output:
  """The last hidden states of a batch of sequences.

  Args:
    tokens_BT: int32.
    positions_BT: where tokens stand; 0 to T - 1 by default. The window and
      causality follow the order of the tokens.
    segment_ids_BT: int32; attention stays within equal ids.
    key: turns on what belongs to training alone (dropout, router noise).

  Raises:
    ValueError: more tokens than learned positions, or nothing to simulate.
  """
  context = make_context(config, tokens_BT, positions_BT, segment_ids_BT, key)
  params = simulated.parameters(params, execution.simulate)
  if axis_size("stage") > 1:
    return _forward_in_stages(config, params, tokens_BT, context, execution)
  if execution.scan_layers and "layers" not in params:
    return Decoder(config, execution).apply({"params": params}, tokens_BT,
                                            context)
  return _forward_per_layer(config, per_layer(config, params), tokens_BT,
                            context, execution)


def _forward_in_stages(config, params, tokens_BT, context, execution):
  pipeline.check(config, context.key is not None)
  if "layers" in params:
    raise ValueError("parameters per layer under a mesh of stages: use those "
                     "of init_params, whose stacks are split")
  stack, = stacks(config)
  period = Period(config, stack.kinds, execution)

  def apply(p, x_BTD, index, context):
    return period.apply({"params": p}, x_BTD, index, context)

  axes = nn.get_partition_spec(jax.eval_shape(functools.partial(
      init_variables, config), jax.random.key(0)))["stack_0"]
  # Routers are used whole.
  specs = jax.tree.map(
      lambda x: spec(*(x[:1] if "router" in x else x), fsdp=execution.fsdp),
      axes, is_leaf=lambda x: isinstance(x, PartitionSpec))
  x_BTD = _embed(config, params, tokens_BT, context, execution)
  x_BTD, routers = pipeline.run(
      apply, params["stack_0"], specs,
      stack.start + len(stack.kinds) * jnp.arange(stack.repeats), x_BTD,
      context._replace(key=None),
      pipeline.choose_microbatches(len(tokens_BT), execution.microbatches))
  return Output(_final_norm(config, params, x_BTD),
                jax.tree.map(_interleave, *routers) if routers else None)


def _forward_per_layer(config, params, tokens_BT, context, execution):
  x_BTD = _embed(config, params, tokens_BT, context, execution)
  routers = []
  for index, kind in enumerate(config.layers):

    def layer(p, x_BTD, index=index, kind=kind):
      return Layer(config, kind, execution).apply({"params": p}, x_BTD, index,
                                                  context)[:2]

    if execution.remat != "none":
      layer = jax.checkpoint(layer, policy=REMAT_POLICIES[execution.remat])
    x_BTD, router = layer(params["layers"][str(index)], x_BTD)
    if router is not None:
      routers.append(router)
  router = jax.tree.map(lambda *x: jnp.stack(x), *routers) if routers else None
  return Output(_final_norm(config, params, x_BTD), router)


def _embed(config, params, tokens_BT, context, execution):
  return Embedding(config, execution).apply({"params": params["embed"]},
                                            tokens_BT, context)


def _final_norm(config, params, x_BTD):
  return Norm(config.norm).apply({"params": params["final_norm"]}, x_BTD)


def unembedding(config: ModelConfig, params: dict):
  """The matrix [D, V] that turns hidden states into logits."""
  return (params["embed"]["embedding"].T if config.tie_embeddings
          else params["unembedding"])


def logits(config: ModelConfig, params: dict, hidden_BTD, fsdp: bool = True):
  """Float32 [B, T, V] of [B, T, D], or [B, V] of [B, D]; soft-capped if the
  model does. `fsdp`: how the parameters are split, as in `Execution`."""
  table_DV = unembedding(config, params).astype(hidden_BTD.dtype)
  return soft_cap(project(hidden_BTD, table_DV, fsdp), config.final_soft_cap)


def per_layer(config: ModelConfig, params: dict) -> dict:
  """The same parameters with `layers` {"0": ...} in place of the stacks."""
  if "layers" in params:
    return params
  rest = {name: leaf for name, leaf in params.items()
          if not name.startswith("stack_")}
  layers = {}
  for i, stack in enumerate(stacks(config)):
    for repeat in range(stack.repeats):
      for j in range(len(stack.kinds)):
        layers[str(len(layers))] = jax.tree.map(
            lambda x: x[repeat], params[f"stack_{i}"][f"layer_{j}"])
  return {**rest, "layers": layers}


def forward_with_cache(config: ModelConfig, params: dict,
                       cache: Cache, tokens_BT, positions_BT, *,
                       execution: Execution = Execution()):
  """Hidden states of new tokens, and the cache with them in it.

  Layers run one after the other, not scanned: a scan would copy the cache and
  each layer's weights at every step.

  Args:
    params: best `per_layer`; stacks are taken apart at every call.
    cache: of these sequences. T > 1 tokens must be a prompt that begins an
      empty cache.
    positions_BT: int32, where the tokens stand; -1 marks padding, which may
      stand to the left of a prompt.

  Raises:
    ValueError: `execution` simulates something.
  """
  if execution.simulate != "none":
    raise ValueError(f"execution.simulate={execution.simulate!r} is of whole "
                     "sequences, not of decoding: use 'none', and parameters "
                     "that are quantized")
  params = per_layer(config, params)
  segment_ids_BT = None
  if tokens_BT.shape[1] > 1:
    segment_ids_BT = (positions_BT >= 0).astype(jnp.int32)
  context = make_context(config, tokens_BT, positions_BT, segment_ids_BT)
  x_BTD = _embed(config, params, tokens_BT, context, execution)
  new_cache = []
  for index, (kind, layer_cache) in enumerate(
      zip(config.layers, cache, strict=True)):
    x_BTD, _, layer_cache = Layer(config, kind, execution).apply(
        {"params": params["layers"][str(index)]}, x_BTD, index, context,
        layer_cache)
    new_cache.append(layer_cache)
  return _final_norm(config, params, x_BTD), new_cache
