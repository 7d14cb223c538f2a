"""The architecture of a decoder, and nothing else, as frozen dataclasses.

What does not change the function a checkpoint computes (dtype, remat, mesh,
sampling, optimizer) is an argument of the code that uses it.
"""
import dataclasses
import difflib
import types
import typing


def _require(condition: bool, message: str):
  if not condition:
    raise ValueError(message)


def _positive(config, *names: str):
  for name in names:
    value = getattr(config, name)
    _require(value > 0, f"{type(config).__name__}.{name}={value}: must be "
             "positive")


def _one_of(config, name: str, choices: tuple):
  value = getattr(config, name)
  _require(value in choices,
           f"{type(config).__name__}.{name}={value!r}: use one of {choices}")


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Positions divided by `factor` (Gemma 3's full layers)."""
  factor: float

  def __post_init__(self):
    _positive(self, "factor")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3.1: long wavelengths are divided by `factor`, short ones kept."""
  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_context: int = 8192

  def __post_init__(self):
    _positive(self, "factor", "low_freq_factor", "original_context")
    _require(self.high_freq_factor > self.low_freq_factor,
             f"high_freq_factor={self.high_freq_factor}: must exceed "
             f"low_freq_factor={self.low_freq_factor}")


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN (arXiv 2309.00071, section 3): a ramp between the two.

  cos and sin are multiplied by 0.1 ln(factor) + 1. `truncate` rounds the ends
  of the ramp outward to whole dimensions; gpt-oss does not.
  """
  factor: float = 32.0
  original_context: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = False

  def __post_init__(self):
    _positive(self, "original_context", "beta_slow")
    _require(self.factor >= 1, f"factor={self.factor}: must be at least 1")
    _require(self.beta_fast > self.beta_slow,
             f"beta_fast={self.beta_fast}: must exceed "
             f"beta_slow={self.beta_slow}")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary positions, the two halves of a head rotated (not its pairs)."""
  theta: float = 10000.0
  scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

  def __post_init__(self):
    _positive(self, "theta")


@dataclasses.dataclass(frozen=True)
class NormConfig:
  """`scale_offset` 1 multiplies by (1 + scale), as Gemma does.

  `placement` "pre" normalises what a sub-layer reads, "pre_and_post" what it
  writes too (Gemma 2 and 3).
  """
  kind: str = "rmsnorm"
  eps: float = 1e-6
  scale_offset: float = 0.0
  placement: str = "pre"

  def __post_init__(self):
    _one_of(self, "kind", ("rmsnorm", "layernorm"))
    _one_of(self, "placement", ("pre", "pre_and_post"))
    _positive(self, "eps")


PROJECTIONS = ("q", "k", "v", "o")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Grouped-query attention.

  `sliding_window` counts keys including the query's own and applies to layers
  of kind "sliding". `rope_sliding` and `rope_full` are the rotary positions of
  the two kinds of layer (None: none). `scale` None is head_dim ** -0.5.
  """
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_full: RopeConfig | None = None
  rope_sliding: RopeConfig | None = None
  sliding_window: int | None = None
  biases: tuple[str, ...] = ()
  qk_norm: bool = False
  sinks: bool = False
  soft_cap: float | None = None
  scale: float | None = None

  def __post_init__(self):
    _positive(self, "num_heads", "num_kv_heads", "head_dim")
    _require(self.num_heads % self.num_kv_heads == 0,
             f"num_heads={self.num_heads} is not a multiple of "
             f"num_kv_heads={self.num_kv_heads}: each key/value head serves "
             "a whole number of query heads")
    for name in ("sliding_window", "soft_cap", "scale"):
      if getattr(self, name) is not None:
        _positive(self, name)
    unknown = set(self.biases) - set(PROJECTIONS)
    _require(not unknown, f"biases={self.biases}: use some of {PROJECTIONS}")
    if self.rope_full or self.rope_sliding:
      _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim}: rotary "
               "positions need an even head_dim")

  @property
  def query_scale(self) -> float:
    return self.head_dim ** -0.5 if self.scale is None else self.scale


ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "clamped_swiglu")


@dataclasses.dataclass(frozen=True)
class MLPConfig:
  """A feed-forward network; in an expert layer, the shape of one expert.

  `gated` multiplies activation(gate) by up. `interleaved` stores gate in the
  even and up in the odd columns of `gate_up`; otherwise gate comes first.
  "clamped_swiglu" is gpt-oss's: gate = min(gate, swiglu_limit), up clipped to
  +-swiglu_limit, gate * sigmoid(1.702 gate) * (up + 1).
  """
  d_ff: int
  activation: str = "silu"
  gated: bool = True
  bias: bool = False
  interleaved: bool = False
  swiglu_limit: float = 7.0

  def __post_init__(self):
    _positive(self, "d_ff", "swiglu_limit")
    _one_of(self, "activation", ACTIVATIONS)
    _require(self.gated or not self.interleaved,
             "interleaved=True needs gated=True: there is no gate to interleave")
    _require(self.gated or self.activation != "clamped_swiglu",
             "activation='clamped_swiglu' needs gated=True")


ROUTERS = ("softmax_topk", "topk_softmax", "noisy_topk", "expert_choice")


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Which experts a token goes to, and with what weights.

  "softmax_topk": softmax over all experts, then the top k, whose weights are
    divided by their sum when `renormalize` (Qwen3); with one expert per token
    and no renormalisation this is Switch's.
  "topk_softmax": top k of the logits, then a softmax over those (gpt-oss).
  "noisy_topk": as topk_softmax on logits with learned Gaussian noise while
    training (Shazeer et al. 2017, section 2.1).
  "expert_choice": each expert takes its best tokens (Zhou et al. 2022); it
    sees the whole batch, so it is not causal.

  `bias` is a learned bias of the logits. `balance_bias` adds a bias to the
  choice alone, never to the weights (arXiv 2408.15664); no gradient reaches
  it, `train` moves it.
  """
  kind: str = "softmax_topk"
  renormalize: bool = False
  bias: bool = False
  balance_bias: bool = False

  def __post_init__(self):
    _one_of(self, "kind", ROUTERS)
    _require(not (self.renormalize and self.kind != "softmax_topk"),
             f"renormalize=True has no meaning for kind={self.kind!r}")
    _require(not (self.balance_bias
                  and self.kind in ("noisy_topk", "expert_choice")),
             f"balance_bias=True has no meaning for kind={self.kind!r}: use "
             "'softmax_topk' or 'topk_softmax'")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """A mixture of experts; `shared` is an MLP that every token goes through."""
  num_experts: int
  experts_per_token: int
  expert: MLPConfig
  router: RouterConfig = RouterConfig()
  shared: MLPConfig | None = None

  def __post_init__(self):
    _positive(self, "num_experts", "experts_per_token")
    _require(self.experts_per_token <= self.num_experts,
             f"experts_per_token={self.experts_per_token} exceeds "
             f"num_experts={self.num_experts}: a token cannot visit more "
             "experts than there are")


LAYER_KINDS = ("full", "sliding")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. `layer_pattern` repeats over the layers; the feed-forward is
  `mlp` in the first `num_dense_layers` layers and `moe` in the others (`mlp`
  everywhere without `moe`).

  `max_positions` > 0 adds learned positions (GPT-2). `scale_embeddings`
  multiplies embeddings by sqrt(d_model). `dropout` acts on embeddings and on
  what sub-layers write, while training; not on attention weights, which are
  never stored.
  """
  vocab_size: int
  d_model: int
  num_layers: int
  attention: AttentionConfig
  mlp: MLPConfig | None = None
  moe: MoEConfig | None = None
  num_dense_layers: int = 0
  layer_pattern: tuple[str, ...] = ("full",)
  norm: NormConfig = NormConfig()
  max_positions: int = 0
  tie_embeddings: bool = False
  scale_embeddings: bool = False
  final_soft_cap: float | None = None
  dropout: float = 0.0

  def __post_init__(self):
    _positive(self, "vocab_size", "d_model", "num_layers")
    _require(len(self.layer_pattern) > 0, "layer_pattern is empty: use "
             f"kinds from {LAYER_KINDS}")
    for kind in self.layer_pattern:
      _require(kind in LAYER_KINDS, f"layer_pattern={self.layer_pattern}: "
               f"unknown kind {kind!r}, use {LAYER_KINDS}")
    _require("sliding" not in self.layer_pattern
             or self.attention.sliding_window is not None,
             f"layer_pattern={self.layer_pattern} needs "
             "attention.sliding_window")
    _require(self.mlp is not None or self.moe is not None,
             "neither mlp nor moe is given: a layer needs a feed-forward")
    _require(0 <= self.num_dense_layers <= self.num_layers,
             f"num_dense_layers={self.num_dense_layers} is not between 0 and "
             f"num_layers={self.num_layers}")
    if self.moe is None:
      _require(self.num_dense_layers == 0,
               "num_dense_layers counts the dense layers before the experts: "
               "leave it 0 without moe")
    else:
      _require((self.mlp is not None) == (self.num_dense_layers > 0),
               f"num_dense_layers={self.num_dense_layers} with mlp="
               f"{'given' if self.mlp else None}: the dense layers before the "
               "experts need mlp, and mlp needs such layers")
    _require(self.max_positions >= 0,
             f"max_positions={self.max_positions}: must not be negative")
    _require(0 <= self.dropout < 1, f"dropout={self.dropout}: must be in "
             "[0, 1)")
    if self.final_soft_cap is not None:
      _positive(self, "final_soft_cap")

  @property
  def layers(self) -> tuple["LayerKind", ...]:
    """What each layer is, in order."""
    return tuple(
        LayerKind(self.layer_pattern[i % len(self.layer_pattern)],
                  self.moe is not None and i >= self.num_dense_layers)
        for i in range(self.num_layers))


class LayerKind(typing.NamedTuple):
  attention: str
  moe: bool


class Stack(typing.NamedTuple):
  """`kinds` repeated `repeats` times, beginning at layer `start`."""
  kinds: tuple[LayerKind, ...]
  repeats: int
  start: int


def stacks(config: ModelConfig) -> tuple[Stack, ...]:
  """The layers as runs of a repeated period, each of which is scanned.

  A pattern that does not divide the layers leaves a shorter run at the end,
  and dense layers before the experts a run at the beginning.
  """
  layers, runs, start = config.layers, [], 0
  while start < len(layers):
    period = len(config.layer_pattern)
    if not layers[start].moe and config.moe is not None:
      left = config.num_dense_layers - start
    else:
      left = len(layers) - start
    period = min(period, left)
    runs.append(Stack(layers[start:start + period], left // period, start))
    start += left // period * period
  return tuple(runs)


def to_dict(config) -> dict:
  """A config as JSON-able values; sub-configs of a union carry their type."""
  result = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      value = {"type": type(value).__name__, **to_dict(value)}
    result[field.name] = list(value) if isinstance(value, tuple) else value
  return result


def from_dict(cls, values: dict, path: str = ""):
  """The inverse of `to_dict`; an unknown key or wrong type is refused."""
  where = path or cls.__name__
  if not isinstance(values, dict):
    raise ValueError(f"{where}={values!r}: expected a mapping of the fields "
                     f"of {cls.__name__}")
  if values.get("type", cls.__name__) != cls.__name__:
    raise ValueError(f"{where}.type={values['type']!r}: use {cls.__name__!r}")
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  values = {k: v for k, v in values.items() if k != "type"}
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, 1)
      raise ValueError(
          f"{where} has no field {key!r}: "
          + (f"did you mean {near[0]!r}?" if near
             else f"its fields are {', '.join(fields)}"))
  missing = [name for name, field in fields.items()
             if name not in values and field.default is dataclasses.MISSING
             and field.default_factory is dataclasses.MISSING]
  if missing:
    raise ValueError(f"{where} lacks {', '.join(missing)}")
  return cls(**{key: _parse(hints[key], value, f"{where}.{key}")
                for key, value in values.items()})


def _parse(hint, value, path: str):
  choices = (typing.get_args(hint)
             if isinstance(hint, types.UnionType) else (hint,))
  if value is None and type(None) in choices:
    return None
  configs = [c for c in choices if dataclasses.is_dataclass(c)]
  if configs:
    if type(value) in configs:
      return value
    name = value.get("type") if isinstance(value, dict) else None
    named = [c for c in configs if c.__name__ == name]
    if len(configs) > 1 and not named:
      raise ValueError(f"{path}.type={name!r}: use one of "
                       f"{[c.__name__ for c in configs]}")
    return from_dict((named or configs)[0], value, path)
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if isinstance(value, (list, tuple)):
      return tuple(_parse(item, v, f"{path}[{i}]")
                   for i, v in enumerate(value))
  elif float in choices and type(value) in (int, float):
    return float(value)
  elif type(value) in choices:
    return value
  raise ValueError(f"{path}={value!r}: expected "
                   f"{getattr(hint, '__name__', hint)}, got "
                   f"{type(value).__name__}")
