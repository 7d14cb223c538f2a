"""GGUF checkpoints (llama.cpp's): what they are of, and their tensors."""
import pathlib
import re
import warnings

import numpy as np

from jaxlm import families
from jaxlm.config import Llama3Scaling, RopeConfig
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes
from jaxlm.convert.gguf_file import GGUFFile, read_file
from jaxlm.convert.gguf_tokenizer import tokenizer_files
from jaxlm.convert.rules import Rule, bind, to_ours
from jaxlm.convert.tensors import Tensor
from jaxlm.families.hf_config import KEPT
from jaxlm.model.rope import frequencies
from jaxlm.quant import MXFP4

# Larger sizes are in no model, and three of them would overflow a shape.
_LARGEST = 2 ** 20


def recognizes(path: pathlib.Path) -> bool:
  if not path.is_file():
    return False
  with open(path, "rb") as file:
    return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def read(path: pathlib.Path) -> Checkpoint:
  """The checkpoint in a file, its tensors not read yet.

  What is quantized dequantizes when it is read, except experts in MXFP4.

  Raises:
    ValueError: something is missing, damaged, unknown or does not fit.
    NotImplementedError: the metadata ask for what is not supported.
  """
  file = read_file(path)
  try:
    values = hf_config(file)
    _, config = families.from_hf_config(values)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  rules = _RULES + _BY_ARCHITECTURE[_architecture(file)]
  packed = _packed(file, rules, config.num_layers)
  tensors = _as_published(file)
  for names in packed.values():
    for name in names:
      del tensors[name]
      tensors |= dict(zip((f"{name}/blocks", f"{name}/scales"),
                          file.packed[name], strict=True))
  units = bind(rules, leaf_shapes(config, dict.fromkeys(packed, MXFP4)))
  files = {}
  try:
    files = tokenizer_files(file.metadata)
  except ValueError as error:
    warnings.warn(f"{path}: its tokenizer is left out: {error}", stacklevel=2)
  return Checkpoint(config, to_ours(units, tensors, str(path)),
                    {name: values[name] for name in KEPT if name in values},
                    files)


def _layer(*rules: tuple) -> tuple[Rule, ...]:
  return tuple(Rule("layers/{layer}/" + ours, tuple(
      "blk.{layer}." + name for name in theirs.split()), pattern)
               for ours, theirs, pattern in rules)


_RULES = (
    Rule("embed/embedding", "token_embd.weight", "V D -> V D"),
    Rule("final_norm/scale", "output_norm.weight", "D -> D"),
    Rule("unembedding", "output.weight", "V D -> D V"),
    *_layer(
        ("attention/q_proj", "attn_q.weight", "(N H) D -> D N H"),
        ("attention/k_proj", "attn_k.weight", "(K H) D -> D K H"),
        ("attention/v_proj", "attn_v.weight", "(K H) D -> D K H"),
        ("attention/o_proj", "attn_output.weight", "D (N H) -> N H D"),
        ("attention/q_bias", "attn_q.bias", "(N H) -> N H"),
        ("attention/k_bias", "attn_k.bias", "(K H) -> K H"),
        ("attention/v_bias", "attn_v.bias", "(K H) -> K H"),
        ("attention/o_bias", "attn_output.bias", "D -> D"),
        ("attention/q_norm/scale", "attn_q_norm.weight", "H -> H"),
        ("attention/k_norm/scale", "attn_k_norm.weight", "H -> H"),
        ("attention/sinks", "attn_sinks.weight", "N -> N"),
        ("attention_norm/scale", "attn_norm.weight", "D -> D"),
        ("mlp/gate_up", "ffn_gate.weight ffn_up.weight", "C F D -> D (C F)"),
        ("mlp/down", "ffn_down.weight", "D F -> F D"),
        ("moe/router", "ffn_gate_inp.weight", "E D -> D E"),
        ("moe/router_bias", "ffn_gate_inp.bias", "E -> E"),
        ("moe/down", "ffn_down_exps.weight", "E D F -> E F D"),
        ("moe/down_bias", "ffn_down_exps.bias", "E D -> E D"),
        ("moe/down/blocks", "ffn_down_exps.weight/blocks",
         "E D J B -> E D J B"),
        ("moe/down/scales", "ffn_down_exps.weight/scales", "E D J -> E D J")))

_MLP_NORM = _layer(("mlp_norm/scale", "ffn_norm.weight", "D -> D"))


def _expert_rules(gate_up: str) -> tuple[Rule, ...]:
  """`gate_up` says how the two are one in ours: C counts them."""
  weights = "ffn_gate_exps.weight{0} ffn_up_exps.weight{0}"
  return _layer(
      ("moe/gate_up", weights.format(""), f"C E F D -> E D ({gate_up})"),
      ("moe/gate_up_bias", "ffn_gate_exps.bias ffn_up_exps.bias",
       f"C E F -> E ({gate_up})"),
      ("moe/gate_up/blocks", weights.format("/blocks"),
       f"C E F J B -> E ({gate_up}) J B"),
      ("moe/gate_up/scales", weights.format("/scales"),
       f"C E F J -> E ({gate_up}) J"))


_BY_ARCHITECTURE = {
    "llama": _MLP_NORM + _expert_rules("C F"),
    "qwen2": _MLP_NORM,
    "qwen3": _MLP_NORM,
    "qwen3moe": _MLP_NORM + _expert_rules("C F"),
    "gemma3": _MLP_NORM + _layer(
        ("attention_post_norm/scale", "post_attention_norm.weight", "D -> D"),
        ("mlp_post_norm/scale", "post_ffw_norm.weight", "D -> D")),
    # Its norm before the experts is named after what precedes it.
    "gpt-oss": _expert_rules("F C") + _layer(
        ("mlp_norm/scale", "post_attention_norm.weight", "D -> D")),
}


def _packed(file: GGUFFile, rules, num_layers: int) -> dict:
  """Paths of the leaves all of whose tensors are in MXFP4, and their names."""
  packed = {}
  for rule in rules:
    path = rule.ours[0]
    if any(f"{path}/blocks" in other.ours for other in rules):
      for layer in range(num_layers):
        names = [name.format(layer=layer) for name in rule.theirs]
        if all(name in file.packed for name in names):
          packed[path.format(layer=layer)] = names
  return packed


def _as_published(file: GGUFFile) -> dict[str, Tensor]:
  """The tensors with the values that the model's authors published."""
  tensors, architecture = dict(file.tensors), _architecture(file)
  tensors.pop("rope_freqs.weight", None)
  if architecture == "gemma3":
    for name, tensor in tensors.items():
      if name.endswith("norm.weight"):  # stored with the 1 that is added
        tensors[name] = _mapped(tensor, lambda x: x - 1)
  if architecture == "llama":
    number = _Metadata(file)
    heads = {"q": number("attention.head_count")}
    heads["k"] = number("attention.head_count_kv", default=heads["q"])
    for name, tensor in tensors.items():
      match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
      if match:
        tensors[name] = _mapped(tensor, _rotate_halves, heads[match[1]])
  return tensors


def _mapped(tensor: Tensor, function, *args) -> Tensor:
  return tensor._replace(read=lambda: function(tensor.read(), *args))


def _rotate_halves(x, heads: int):
  """Rows of each head from RoPE on pairs to RoPE on halves."""
  if x.shape[0] % (2 * heads):
    raise ValueError(f"{x.shape[0]} rows are no {heads} heads of even size")
  return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


class _Metadata:
  """Values of the architecture, checked."""

  def __init__(self, file: GGUFFile):
    self._values, self._prefix = file.metadata, _architecture(file)

  def __call__(self, name: str, kind: type = int, default=None):
    name = f"{self._prefix}.{name}"
    value = self._values.get(name, default)
    if value is None:
      raise ValueError(f"the metadata lack {name}")
    if type(value) is not kind:
      raise ValueError(f"{name}={value!r}: expected {kind.__name__}")
    if kind is int and not 0 <= value <= _LARGEST:
      raise ValueError(f"{name}={value}: expected at most {_LARGEST}")
    return value

  def __contains__(self, name: str) -> bool:
    return f"{self._prefix}.{name}" in self._values


def _architecture(file: GGUFFile) -> str:
  name = file.metadata.get("general.architecture")
  if name not in _BY_ARCHITECTURE:
    raise ValueError(f"general.architecture={name!r} is not supported: only "
                     f"{', '.join(_BY_ARCHITECTURE)}")
  if file.metadata.get("split.count", 0) not in (0, 1):
    raise ValueError("it is one of several parts: put them together with "
                     "llama.cpp's `llama-gguf-split --merge` first")
  return name


_MODEL_TYPES = {"qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss",
                "gemma3": "gemma3_text"}


def hf_config(file: GGUFFile) -> dict:
  """The config.json that Hugging Face has of the same model."""
  architecture, number = _architecture(file), _Metadata(file)
  for name in ("token_embd.weight", "blk.0.attn_norm.weight"):
    if name not in file.tensors:
      raise ValueError(f"tensor {name!r} is missing")
  heads = number("attention.head_count")
  hidden = number("embedding_length")
  layers = number("block_count")
  found = {name.split(".")[1] for name in file.tensors
           if name.startswith("blk.")}
  if len(found) != layers:
    raise ValueError(f"{architecture}.block_count={layers}, but there are "
                     f"tensors of {len(found)} layers")
  head_dim = number("attention.key_length", default=hidden // max(heads, 1))
  for name in ("attention.value_length", "rope.dimension_count"):
    if number(name, default=head_dim) != head_dim:
      raise ValueError(f"{architecture}.{name}={number(name)} is not supported:"
                       f" only the whole head of {head_dim}")
  values = dict(
      model_type=_MODEL_TYPES.get(architecture, architecture),
      vocab_size=file.tensors["token_embd.weight"].shape[0],
      hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
      num_key_value_heads=number("attention.head_count_kv", default=heads),
      head_dim=head_dim,
      rms_norm_eps=_short(number("attention.layer_norm_rms_epsilon", float)),
      rope_theta=_short(number("rope.freq_base", float, 10000.0)),
      tie_word_embeddings="output.weight" not in file.tensors)
  if architecture != "gpt-oss":
    values["intermediate_size"] = number("feed_forward_length")
  scaling = _rope_scaling(file, number, values)
  if scaling is not None:
    values["rope_scaling"] = scaling
  if "context_length" in number:
    values["max_position_embeddings"] = number("context_length")
  for name in ("bos", "eos", "padding"):
    token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if type(token) is int and token < values["vocab_size"]:
      values[f"{name[:3]}_token_id"] = token
  return values | _more(architecture, number, file, values)


def _more(architecture, number, file, values) -> dict:
  """What is an architecture's own, and what llama.cpp's code knows of it."""
  experts = {}
  if number("expert_count", default=0):
    experts = dict(num_experts_per_tok=number("expert_used_count"))
  match architecture:
    case "llama" if experts:
      return experts | dict(model_type="mixtral",
                            num_local_experts=number("expert_count"))
    case "llama":
      return dict(attention_bias="blk.0.attn_q.bias" in file.tensors)
    case "qwen3moe":
      return experts | dict(
          num_experts=number("expert_count"), norm_topk_prob=True,
          moe_intermediate_size=number("expert_feed_forward_length"))
    case "gpt-oss":
      return experts | dict(
          num_local_experts=number("expert_count"),
          intermediate_size=number("expert_feed_forward_length"),
          sliding_window=number("attention.sliding_window"))
    case "gemma3":
      # The largest one alone scales queries by d_model / num_heads.
      scalar = values["head_dim"]
      if values["num_hidden_layers"] == 62:
        scalar = values["hidden_size"] // max(values["num_attention_heads"], 1)
      own = dict(
          sliding_window=number("attention.sliding_window"),
          query_pre_attn_scalar=scalar, rope_local_base_freq=_short(
              number("rope.freq_base_swa", float, 10000.0)),
          sliding_window_pattern=number("attention.sliding_window_pattern",
                                        default=6))
      if "final_logit_softcapping" in number:
        own["final_logit_softcapping"] = number("final_logit_softcapping",
                                                float)
      return own
  return {}


def _rope_scaling(file: GGUFFile, number: _Metadata, values) -> dict | None:
  if "rope_freqs.weight" in file.tensors:
    return _llama3(file.tensors["rope_freqs.weight"], values)
  kind = number("rope.scaling.type", str, "none")
  if kind == "none":
    # What the converters wrote of Llama 2 and its relatives.
    factor = number("rope.scale_linear", float, 1.0)
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}
  if kind not in ("linear", "yarn"):
    raise NotImplementedError(f"rope.scaling.type={kind!r} is not supported: "
                              "only none, linear and yarn")
  scaling = {"rope_type": kind,
             "factor": _short(number("rope.scaling.factor", float))}
  if kind == "yarn":
    scaling |= dict(
        original_max_position_embeddings=number(
            "rope.scaling.original_context_length"),
        beta_fast=_short(number("rope.scaling.yarn_beta_fast", float, 32.0)),
        beta_slow=_short(number("rope.scaling.yarn_beta_slow", float, 1.0)),
        # llama.cpp always truncates; gpt-oss was published without.
        truncate=_architecture(file) != "gpt-oss")
  return scaling


def _llama3(tensor: Tensor, values: dict) -> dict:
  """Llama 3's scaling from the factors of its frequencies."""
  base, head_dim = RopeConfig(values["rope_theta"]), values["head_dim"]
  if tensor.shape == (head_dim // 2,):
    factors = tensor.read().astype(np.float64)
    scaling = Llama3Scaling(float(max(factors.max(), 1)))
    scaled, _ = frequencies(RopeConfig(base.theta, scaling), head_dim)
    if np.allclose(frequencies(base, head_dim)[0] / scaled, factors, 1e-4):
      return dict(rope_type="llama3", factor=scaling.factor,
                  low_freq_factor=scaling.low_freq_factor,
                  high_freq_factor=scaling.high_freq_factor,
                  original_max_position_embeddings=scaling.original_context)
  raise ValueError("rope_freqs.weight is not Llama 3's scaling of a context of "
                   "8192, and no other is supported")


def _short(x: float) -> float:
  """The shortest number that is the same in float32: 1e-05, as was meant."""
  return float(str(np.float32(x)))
