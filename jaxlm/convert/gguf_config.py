"""What a GGUF file's metadata say of a model, as Hugging Face would."""
import numpy as np

from jaxlm.config import Llama3Scaling, RopeConfig
from jaxlm.convert.gguf_file import GGUFFile
from jaxlm.convert.tensors import Tensor
from jaxlm.model.rope import frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "gpt-oss")
# Larger sizes are in no model, and three of them would overflow a shape.
_LARGEST = 2 ** 20


class Metadata:
  """Values of the architecture, checked."""

  def __init__(self, file: GGUFFile):
    self._values, self._prefix = file.metadata, architecture_of(file)

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


def architecture_of(file: GGUFFile) -> str:
  name = file.metadata.get("general.architecture")
  if name not in ARCHITECTURES:
    raise ValueError(f"general.architecture={name!r} is not supported: only "
                     f"{', '.join(ARCHITECTURES)}")
  if file.metadata.get("split.count", 0) not in (0, 1):
    raise ValueError("it is one of several parts: put them together with "
                     "llama.cpp's `llama-gguf-split --merge` first")
  return name


_MODEL_TYPES = {"qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss",
                "gemma3": "gemma3_text"}


def hf_config(file: GGUFFile) -> dict:
  """The config.json that Hugging Face has of the same model."""
  architecture, number = architecture_of(file), Metadata(file)
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


def _rope_scaling(file: GGUFFile, number: Metadata, values) -> dict | None:
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
        truncate=architecture_of(file) != "gpt-oss")
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
