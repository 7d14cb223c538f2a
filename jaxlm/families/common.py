"""What the families that are named as Llama is have in common."""
import math

from jaxlm.config import PROJECTIONS, AttentionConfig, ModelConfig, RopeConfig
from jaxlm.convert.rules import Rule
from jaxlm.families.hf_config import Fields, layer_types, rope_scaling

_LAYER = "model.layers.{layer}"


def _rules(ours: str, theirs: str, *rules: tuple) -> tuple[Rule, ...]:
  """Rules below two prefixes."""
  result = []
  for path, names, pattern in rules:
    names = (names,) if isinstance(names, str) else names
    result.append(Rule(f"{ours}/{path}",
                       tuple(f"{theirs}.{name}" for name in names), pattern))
  return tuple(result)


OUTER_RULES = (
    Rule("embed/embedding", "model.embed_tokens.weight", "V D -> V D"),
    Rule("final_norm/scale", "model.norm.weight", "D -> D"),
    Rule("unembedding", "lm_head.weight", "V D -> D V"))

ATTENTION_RULES = _rules(
    "layers/{layer}/attention", _LAYER + ".self_attn",
    ("q_proj", "q_proj.weight", "(N H) D -> D N H"),
    ("k_proj", "k_proj.weight", "(K H) D -> D K H"),
    ("v_proj", "v_proj.weight", "(K H) D -> D K H"),
    ("o_proj", "o_proj.weight", "D (N H) -> N H D"),
    ("q_bias", "q_proj.bias", "(N H) -> N H"),
    ("k_bias", "k_proj.bias", "(K H) -> K H"),
    ("v_bias", "v_proj.bias", "(K H) -> K H"),
    ("o_bias", "o_proj.bias", "D -> D"),
    ("q_norm/scale", "q_norm.weight", "H -> H"),
    ("k_norm/scale", "k_norm.weight", "H -> H"),
    ("sinks", "sinks", "N -> N"))

PRE_NORM_RULES = _rules(
    "layers/{layer}", _LAYER,
    ("attention_norm/scale", "input_layernorm.weight", "D -> D"),
    ("mlp_norm/scale", "post_attention_layernorm.weight", "D -> D"))

PRE_AND_POST_NORM_RULES = _rules(
    "layers/{layer}", _LAYER,
    ("attention_norm/scale", "input_layernorm.weight", "D -> D"),
    ("attention_post_norm/scale", "post_attention_layernorm.weight", "D -> D"),
    ("mlp_norm/scale", "pre_feedforward_layernorm.weight", "D -> D"),
    ("mlp_post_norm/scale", "post_feedforward_layernorm.weight", "D -> D"))


def mlp_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
  """A gated network at a path of a layer, such as mlp, and their name of it."""
  return _rules(
      "layers/{layer}/" + ours, f"{_LAYER}.{theirs}",
      ("gate_up", ("gate_proj.weight", "up_proj.weight"), "C F D -> D (C F)"),
      ("gate_up_bias", ("gate_proj.bias", "up_proj.bias"), "C F -> (C F)"),
      ("down", "down_proj.weight", "D F -> F D"),
      ("down_bias", "down_proj.bias", "D -> D"))


def moe_rules(theirs: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
  """Experts stored one by one, under these names."""
  return _rules(
      "layers/{layer}/moe", f"{_LAYER}.{theirs}",
      ("router", "gate.weight", "E D -> D E"),
      ("gate_up", (f"experts.{{expert}}.{gate}.weight",
                   f"experts.{{expert}}.{up}.weight"), "E C F D -> E D (C F)"),
      ("down", f"experts.{{expert}}.{down}.weight", "E D F -> E F D"))


LLAMA_RULES = (*OUTER_RULES, *PRE_NORM_RULES, *ATTENTION_RULES,
               *mlp_rules("mlp", "mlp"))


def attention(fields: Fields, pattern: tuple[str, ...] = ("full",),
              rope_full: RopeConfig | None = None,
              rope_sliding: RopeConfig | None = None,
              **more) -> AttentionConfig:
  """The fields of attention; without ropes, the one that all layers have.

  `biases` defaults to what attention_bias says.
  """
  heads = fields("num_attention_heads")
  if rope_full is None:
    rope_full = rope_sliding = fields.rope("full")
  if "biases" not in more:
    more["biases"] = PROJECTIONS if fields("attention_bias", bool) else ()
  return AttentionConfig(
      heads, fields.optional("num_key_value_heads") or heads,
      fields.head_dim(),
      rope_full=rope_full if "full" in pattern else None,
      rope_sliding=rope_sliding if "sliding" in pattern else None, **more)


def outer(fields: Fields) -> dict:
  """The fields of ModelConfig that every family has."""
  return dict(
      vocab_size=fields("vocab_size"), d_model=fields("hidden_size"),
      num_layers=fields.num_layers(),
      tie_embeddings=fields("tie_word_embeddings", bool))


def to_hf(config: ModelConfig, **more) -> dict:
  """The fields of a config.json that every family has, and more."""
  c = config.attention
  rope = c.rope_full or c.rope_sliding or RopeConfig()
  return dict(
      vocab_size=config.vocab_size, hidden_size=config.d_model,
      num_hidden_layers=config.num_layers, num_attention_heads=c.num_heads,
      num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
      rms_norm_eps=config.norm.eps, attention_bias="o" in c.biases,
      tie_word_embeddings=config.tie_embeddings, rope_theta=rope.theta,
      rope_scaling=rope_scaling(rope), **more)


def sliding_pattern(fields: Fields) -> tuple[tuple[str, ...], int | None]:
  """Qwen's layer pattern and window: from max_window_layers on, layers slide
  if use_sliding_window."""
  window = fields.optional("sliding_window")
  if not fields("use_sliding_window", bool):
    window = None
  first = fields("max_window_layers")
  return fields.layer_pattern(
      lambda i: window is not None and i >= first), window


def sliding_fields(config: ModelConfig) -> dict:
  window = config.attention.sliding_window
  return dict(use_sliding_window=window is not None, sliding_window=window,
              layer_types=layer_types(config))


def query_scale(fields: Fields) -> float | None:
  """Gemma's query_pre_attn_scalar ** -0.5, None if that is the usual one."""
  scalar = fields("query_pre_attn_scalar", float)
  if scalar <= 0:
    raise ValueError(f"config.json: query_pre_attn_scalar={scalar}: must be "
                     "positive")
  return None if scalar == fields.head_dim() else scalar ** -0.5


def query_scalar(config: ModelConfig) -> int | float:
  """The inverse of `query_scale`: a whole number where it is one."""
  scalar = config.attention.query_scale ** -2
  whole = round(scalar)
  return whole if math.isclose(whole, scalar) else scalar
