"""Hugging Face's layout: config.json and safetensors."""
import pathlib
import re
import warnings
from collections.abc import Callable

from jaxlm import families
from jaxlm.config import ModelConfig
from jaxlm.convert import files, fp8, shards
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes, packed_leaves
from jaxlm.convert.rules import bind, to_ours, to_theirs
from jaxlm.convert.tensors import Tensor
from jaxlm.families.family import Family
from jaxlm.families.hf_config import KEPT


def recognizes(path: pathlib.Path) -> bool:
  config = path / "config.json"
  return config.is_file() and "model_type" in files.read_json(config)


def read(directory: pathlib.Path) -> Checkpoint:
  """The checkpoint in a directory, its tensors not read yet.

  Raises:
    ValueError: something is missing, damaged, unknown or does not fit.
    NotImplementedError: config.json asks for what is not supported.
  """
  values = files.read_json(directory / "config.json")
  family, config = families.from_hf_config(values)
  quantization = values.get("quantization_config") or {}
  method = quantization.get("quant_method")
  if method not in (None, "mxfp4", "fp8"):
    raise NotImplementedError(
        f"{directory}/config.json: quant_method={method!r} is not supported: "
        "only mxfp4, fp8, or a checkpoint that is not quantized")
  tensors = _of_the_text_model(family, config,
                               shards.read_directory(directory))
  if method == "fp8":
    tensors = fp8.dequantized(tensors, quantization)
  if config.tie_embeddings:
    tensors.pop("lm_head.weight", None)  # A copy that some files have.
  shapes = leaf_shapes(config, packed_leaves(config, family.rules, tensors))
  text = values.get("text_config", values)
  return Checkpoint(
      config, to_ours(bind(family.rules, shapes), tensors, str(directory)),
      {name: text[name] for name in KEPT if name in text},
      files.text_files(directory))


def _of_the_text_model(family: Family, config: ModelConfig,
                       tensors) -> dict[str, Tensor]:
  """The tensors that matter, by the names that the rules know."""
  result, vision, further = {}, [], []
  for name, tensor in tensors.items():
    for pattern, replacement in family.renames:
      name = re.sub(r"\A(?:" + pattern + ")", replacement, name)
    if family.vision and re.fullmatch(family.vision, name):
      vision.append(name)
    elif family.predicts_further and _layer(name) >= config.num_layers:
      further.append(name)
    elif not re.fullmatch(family.left_out, name):
      result[name] = tensor
  if vision:
    warnings.warn(f"{len(vision)} tensors of the part that reads images are "
                  "left out: only the text decoder is read", stacklevel=2)
  if further:
    warnings.warn(f"{len(further)} tensors of layers from {config.num_layers} "
                  "on, which predict further tokens (MTP), are left out: only "
                  "the main model is read", stacklevel=2)
  return result


def _layer(name: str) -> int:
  """The layer a tensor is of, -1 if of none."""
  match = re.match(r"model\.layers\.(\d{1,9})\.", name)
  return int(match[1]) if match else -1


def write(checkpoint: Checkpoint, directory: pathlib.Path,
          progress: Callable[[int], None] = lambda nbytes: None) -> None:
  """Writes what transformers reads.

  Raises:
    ValueError: Hugging Face has no such architecture.
  """
  family, values = families.hf_family(checkpoint.config)
  units = bind(family.rules, {path: tensor.shape for path, tensor
                              in checkpoint.tensors.items()})
  values |= checkpoint.about
  values["torch_dtype"] = checkpoint.dtype
  if any(path.endswith("/blocks") for path in checkpoint.tensors):
    values["quantization_config"] = {
        "quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router",
            "model.embed_tokens", "lm_head"]}
  files.write_json(directory / "config.json", values)
  shards.write_directory(directory, to_theirs(units, checkpoint.tensors),
                         progress)
