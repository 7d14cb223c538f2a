"""GGUF checkpoints (llama.cpp's): what they are of, and their tensors."""
import pathlib
import re
import warnings

from jaxlm import families
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes
from jaxlm.convert.gguf_config import (Metadata, architecture_of,
                                       hf_config)
from jaxlm.convert.gguf_file import GGUFFile, read_file
from jaxlm.convert.gguf_tokenizer import tokenizer_files
from jaxlm.convert.rules import Rule, bind, to_ours
from jaxlm.convert.tensors import Tensor
from jaxlm.families.hf_config import KEPT
from pallas_kernels.quant import MXFP4


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
  rules = _RULES + _BY_ARCHITECTURE[architecture_of(file)]
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
  tensors, architecture = dict(file.tensors), architecture_of(file)
  tensors.pop("rope_freqs.weight", None)
  if architecture == "gemma3":
    for name, tensor in tensors.items():
      if name.endswith("norm.weight"):  # stored with the 1 that is added
        tensors[name] = _mapped(tensor, lambda x: x - 1)
  if architecture == "llama":
    number = Metadata(file)
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
