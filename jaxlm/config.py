"""The architecture of a decoder, and nothing else, as frozen dataclasses.

What does not change the function a checkpoint computes (dtype, remat, mesh,
sampling, optimizer) is an argument of the code that uses it.
"""
import dataclasses
import math
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

  cos and sin are multiplied by m(mscale) / m(mscale_all_dim), where m(s) is
  0.1 s ln(factor) + 1; multi-head latent attention also multiplies its scores
  by m(mscale_all_dim)^2, DeepSeek's way to scale what is not rotated too.
  `truncate` rounds the ends of the ramp outward to whole dimensions; gpt-oss
  does not.
  """
  factor: float = 32.0
  original_context: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = False
  mscale: float = 1.0
  mscale_all_dim: float = 0.0

  def __post_init__(self):
    _positive(self, "original_context", "beta_slow")
    _require(self.factor >= 1, f"factor={self.factor}: must be at least 1")
    _require(self.beta_fast > self.beta_slow,
             f"beta_fast={self.beta_fast}: must exceed "
             f"beta_slow={self.beta_slow}")
    for name in ("mscale", "mscale_all_dim"):
      _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must "
               "not be negative")

  def magnitude(self, mscale: float) -> float:
    return 0.1 * mscale * math.log(self.factor) + 1

  @property
  def rotation_factor(self) -> float:
    """What multiplies cos and sin."""
    return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary positions. Frequency i turns components i and i + H/2 of a head of
  H, or with `interleaved` components 2i and 2i + 1."""
  theta: float = 10000.0
  scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
  interleaved: bool = False

  def __post_init__(self):
    _positive(self, "theta")


@dataclasses.dataclass(frozen=True)
class NormConfig:
  """`scale_offset` 1 multiplies by (1 + scale), as Gemma does.

  `placement` "pre" normalises what a sub-layer reads, "pre_and_post" what it
  writes too (Gemma 2 and 3), "post" neither but their sum (the original
  Transformer, arXiv 1706.03762, section 3.1). Wherever these stand, one more
  normalises what the last layer leaves.
  """
  kind: str = "rmsnorm"
  eps: float = 1e-6
  scale_offset: float = 0.0
  placement: str = "pre"

  def __post_init__(self):
    _one_of(self, "kind", ("rmsnorm", "layernorm"))
    _one_of(self, "placement", ("pre", "pre_and_post", "post"))
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
  def v_head_dim(self) -> int:
    return self.head_dim

  @property
  def query_scale(self) -> float:
    return self.head_dim ** -0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Multi-head latent attention (arXiv 2412.19437, section 2.1.1).

  Keys and values of all heads come from one latent of width `kv_rank`, queries
  from one of width `q_rank` (None: from the hidden state itself). A head's
  queries and keys have `nope_head_dim` components without position and
  `rope_head_dim` rotary ones, which in the keys all heads share; its values
  have `v_head_dim`. `norm_eps` is that of the latents' RMSNorms.
  """
  num_heads: int
  kv_rank: int
  nope_head_dim: int
  rope_head_dim: int
  v_head_dim: int
  q_rank: int | None = None
  rope: RopeConfig = RopeConfig(interleaved=True)
  norm_eps: float = 1e-6

  def __post_init__(self):
    _positive(self, "num_heads", "kv_rank", "nope_head_dim", "rope_head_dim",
              "v_head_dim", "norm_eps")
    if self.q_rank is not None:
      _positive(self, "q_rank")
    _require(self.rope_head_dim % 2 == 0, f"rope_head_dim={self.rope_head_dim}"
             ": rotary positions need an even number of components")

  @property
  def head_dim(self) -> int:
    """Of queries and keys."""
    return self.nope_head_dim + self.rope_head_dim

  @property
  def query_scale(self) -> float:
    scale, scaling = self.head_dim ** -0.5, self.rope.scaling
    if isinstance(scaling, YarnScaling):
      scale *= scaling.magnitude(scaling.mscale_all_dim) ** 2
    return scale


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
             "interleaved=True needs gated=True: there is no gate to "
             "interleave")
    _require(self.gated or self.activation != "clamped_swiglu",
             "activation='clamped_swiglu' needs gated=True")


ROUTERS = ("softmax_topk", "sigmoid_topk", "topk_softmax", "noisy_topk",
           "expert_choice")


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Which experts a token goes to, and with what weights.

  "softmax_topk": softmax over all experts, then the top k, whose weights are
    divided by their sum when `renormalize` (Qwen3); with one expert per token
    and no renormalisation this is Switch's.
  "sigmoid_topk": the same with sigmoids for the softmax (DeepSeek-V3).
  "topk_softmax": top k of the logits, then a softmax over those (gpt-oss).
  "noisy_topk": as topk_softmax on logits with learned Gaussian noise while
    training (Shazeer et al. 2017, section 2.1).
  "expert_choice": each expert takes its best tokens (Zhou et al. 2022); it
    sees the whole batch, so it is not causal.

  `bias` is a learned bias of the logits. `balance_bias` adds a bias to the
  choice alone, never to the weights (arXiv 2408.15664); no gradient reaches
  it, `train` moves it.

  With `num_groups` the experts stand in groups of equal size, and a token
  chooses among those of its best `groups_per_token` groups; a group is as good
  as its two best experts together, the balance bias included (arXiv
  2412.19437, section 2.1.2). `weight_scale` multiplies the weights at last.
  """
  kind: str = "softmax_topk"
  renormalize: bool = False
  bias: bool = False
  balance_bias: bool = False
  num_groups: int = 1
  groups_per_token: int = 1
  weight_scale: float = 1.0

  def __post_init__(self):
    _one_of(self, "kind", ROUTERS)
    _positive(self, "num_groups", "groups_per_token", "weight_scale")
    _require(not self.renormalize
             or self.kind in ("softmax_topk", "sigmoid_topk"),
             f"renormalize=True has no meaning for kind={self.kind!r}")
    for name, given in (("balance_bias", self.balance_bias),
                        ("num_groups", self.num_groups > 1)):
      _require(not given or self.kind not in ("noisy_topk", "expert_choice"),
               f"{name}={getattr(self, name)} has no meaning for kind="
               f"{self.kind!r}: use 'softmax_topk', 'sigmoid_topk' or "
               "'topk_softmax'")
    _require(self.weight_scale == 1 or self.kind != "expert_choice",
             f"weight_scale={self.weight_scale} has no meaning for kind="
             "'expert_choice'")
    _require(self.groups_per_token <= self.num_groups,
             f"groups_per_token={self.groups_per_token} exceeds num_groups="
             f"{self.num_groups}")


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
    router = self.router
    _require(self.num_experts % router.num_groups == 0,
             f"num_experts={self.num_experts} is not a multiple of "
             f"router.num_groups={router.num_groups}: groups are of one size")
    eligible = (self.num_experts // router.num_groups
                * router.groups_per_token)
    _require(self.experts_per_token <= eligible,
             f"experts_per_token={self.experts_per_token} exceeds the "
             f"{eligible} experts of groups_per_token="
             f"{router.groups_per_token} of {router.num_groups} groups")


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
  attention: AttentionConfig | MLAConfig
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
    if "sliding" in self.layer_pattern:
      _require(isinstance(self.attention, AttentionConfig),
               f"layer_pattern={self.layer_pattern}: latent attention is "
               "full, use ('full',)")
      _require(self.attention.sliding_window is not None,
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
