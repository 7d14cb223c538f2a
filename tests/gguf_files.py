"""GGUF files as llama.cpp's converters write them from transformers' models.

Names come from the `gguf` package's own map; what its converters do to values
is done here by hand.
"""
import gguf
import numpy as np
import torch
import transformers

from pallas_kernels.quant import MXFP4
from reference_models import CASES, randomize

ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "qwen2": "qwen2",
                 "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
                 "gemma3_text": "gemma3", "gpt_oss": "gpt-oss"}


def small_model(case: str, **changes):
  """transformers' model of a case with random weights.

  `changes` are of its config; Gemma 3's query scale becomes the usual one,
  for GGUF says no other.
  """
  reference = CASES[case]()[1]
  if reference.model_type == "gemma3_text":
    changes["query_pre_attn_scalar"] = reference.head_dim
  for name, value in changes.items():
    setattr(reference, name, value)
  with torch.random.fork_rng():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        reference, dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager").eval()
    randomize(model, norm_center=0 if "gemma" in case else 1)
  return model


@torch.no_grad()
def write_model(path, model, kinds=lambda name, array: None, metadata=None):
  """Writes a model.

  Args:
    kinds: the type of each tensor, None for float32.
    metadata: called with the writer, to add more.
  """
  architecture = ARCHITECTURES[model.config.model_type]
  writer = gguf.GGUFWriter(path, architecture)
  write_config(writer, model.config)
  writer.add_tokenizer_model("no_vocab")
  if metadata:
    metadata(writer)
  for name, array in tensors_of(model, architecture).items():
    kind = kinds(name, array)
    array = np.ascontiguousarray(array)
    if kind is not None:
      array = (mxfp4_bytes(array) if kind == gguf.GGMLQuantizationType.MXFP4
               else gguf.quantize(array, kind))
    writer.add_tensor(name, array, raw_dtype=kind)
  finish(writer)


def mxfp4_bytes(array) -> np.ndarray:
  """[..., out, in] in MXFP4 as GGUF packs it: the scale of a block, then the
  values i and i + 16 in one byte."""
  leaf = MXFP4.quantize(array.swapaxes(-1, -2))
  codes = np.stack([leaf.blocks & 15, leaf.blocks >> 4], -1)
  codes = codes.reshape(*leaf.scales.shape, 2, 16)
  packed = codes[..., 0, :] | codes[..., 1, :] << 4
  packed = np.concatenate([leaf.scales[..., None], packed], -1)
  return packed.reshape(*array.shape[:-1], -1)


def finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def write_config(writer, config):
  writer.add_context_length(config.max_position_embeddings)
  writer.add_block_count(config.num_hidden_layers)
  writer.add_embedding_length(config.hidden_size)
  writer.add_feed_forward_length(config.intermediate_size)
  writer.add_head_count(config.num_attention_heads)
  writer.add_head_count_kv(config.num_key_value_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  if getattr(config, "sliding_window", None):
    writer.add_sliding_window(config.sliding_window)
  experts = getattr(config, "num_experts", None) or getattr(
      config, "num_local_experts", None)
  if experts:
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(getattr(
        config, "moe_intermediate_size", config.intermediate_size))
  rope = config.rope_parameters
  rope = rope.get("full_attention", rope)
  writer.add_rope_freq_base(rope["rope_theta"])
  if rope["rope_type"] in ("linear", "yarn"):
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
      writer.add_rope_scaling_orig_ctx_len(
          rope["original_max_position_embeddings"])


def tensors_of(model, architecture: str) -> dict[str, np.ndarray]:
  config = model.config
  arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items()
              if name == architecture)
  names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
  tensors = {}

  def add(name, array):
    # "x.weight" and "x.bias" are looked up as x.
    stem, _, suffix = name.rpartition(".")
    tensors[f"{names.get_name(stem)}.{suffix}"] = array

  for name, w in model.named_parameters():
    w = w.numpy()
    if name.endswith("sinks"):
      add(f"{name}.weight", w)
    elif ".experts." in name:
      for part, array in split_experts(name, w, architecture):
        add(part, array)
    elif architecture == "llama" and ("q_proj" in name or "k_proj" in name):
      heads = (config.num_attention_heads if "q_proj" in name
               else config.num_key_value_heads)
      add(name, w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(
          w.shape))
    elif architecture == "gemma3" and name.endswith("norm.weight"):
      add(name, w + 1)
    else:
      add(name, w)
  rope = config.rope_parameters
  if rope.get("rope_type") == "llama3":
    tensors["rope_freqs.weight"] = llama3_factors(rope, config.head_dim)
  return tensors


def split_experts(name, w, architecture):
  """(name, array) of gate, up or down, as [E, out, in]."""
  prefix, _, leaf = name.rpartition(".")
  bias = leaf.endswith("_bias")
  suffix = "bias" if bias else "weight"
  if architecture == "gpt-oss" and not bias:
    w = w.swapaxes(1, 2)
  if leaf.startswith("down_proj"):
    return [(f"{prefix}.down_proj.{suffix}", w)]
  if architecture == "gpt-oss":
    gate, up = w[:, ::2], w[:, 1::2]
  else:
    gate, up = np.split(w, 2, 1)
  return [(f"{prefix}.gate_proj.{suffix}", gate),
          (f"{prefix}.up_proj.{suffix}", up)]


def llama3_factors(rope, head_dim) -> np.ndarray:
  """What frequencies are divided by (Llama 3.1's published code)."""
  wavelength = 2 * np.pi * rope["rope_theta"] ** (
      np.arange(0, head_dim, 2) / head_dim)
  context = rope["original_max_position_embeddings"]
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  smooth = (context / wavelength - low) / (high - low)
  factors = 1 / ((1 - smooth) / rope["factor"] + smooth)
  factors = np.where(wavelength < context / high, 1, factors)
  return np.where(wavelength > context / low, rope["factor"],
                  factors).astype(np.float32)
