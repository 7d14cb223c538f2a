"""The published models: one file an architecture, one name a size."""
import dataclasses
import difflib

from jaxlm.config import AttentionConfig, ModelConfig
from jaxlm.families import (deepseek_v3, gemma2, gemma3, gpt2, gpt_oss, llama,
                            mixtral, qwen2, qwen3, qwen3_moe)
from jaxlm.families.family import Family

_MODULES = (gpt2, llama, qwen2, qwen3, qwen3_moe, gemma2, gemma3, mixtral,
            gpt_oss, deepseek_v3)
_PRESETS = {name: config for module in _MODULES
            for name, config in module.PRESETS.items()}
FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
# The whole of Gemma 3, whose decoder is read.
FAMILIES["gemma3"] = gemma3.FAMILY


def presets() -> tuple[str, ...]:
  """The names that `preset` knows."""
  return tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
  """The config of a published model, by name.

  Raises:
    ValueError: there is no such preset.
  """
  if name in _PRESETS:
    return _PRESETS[name]
  near = difflib.get_close_matches(str(name).lower(), _PRESETS, 3)
  raise ValueError(
      f"there is no preset {name!r}: "
      + (f"did you mean {' or '.join(map(repr, near))}?" if near
         else f"use one of {', '.join(_PRESETS)}"))


def from_hf_config(values: dict) -> tuple[Family, ModelConfig]:
  """What a config.json of Hugging Face describes.

  Raises:
    ValueError: a field is missing, wrong or unknown.
    NotImplementedError: a field has a value that is not supported.
  """
  name = values.get("model_type")
  if name not in list(FAMILIES):
    raise ValueError(f"config.json: model_type={name!r} is not known: only "
                     f"{', '.join(FAMILIES)}")
  return FAMILIES[name], FAMILIES[name].from_hf_config(values)


def hf_family(config: ModelConfig) -> tuple[Family, dict]:
  """The family that can say all of a config, and its config.json.

  Raises:
    ValueError: there is none.
  """
  for family in FAMILIES.values():
    if (family.moe != (config.moe is not None)
        or not isinstance(config.attention, family.attention)):
      continue
    values = {"model_type": family.model_type,
              "architectures": [family.architecture],
              **family.to_hf_config(config)}
    try:
      said = family.from_hf_config(values)
    except (ValueError, NotImplementedError):
      continue
    if same_function(said, config):
      return family, values
  raise ValueError(
      f"no family of Hugging Face's ({', '.join(FAMILIES)}) has this "
      f"architecture: {config}")


def same_function(a: ModelConfig, b: ModelConfig) -> bool:
  """Whether two configs compute the same from the same parameters."""
  return _canonical(a) == _canonical(b)


def _canonical(config: ModelConfig) -> ModelConfig:
  kinds = {layer.attention for layer in config.layers}
  attention = config.attention
  if isinstance(attention, AttentionConfig):
    attention = dataclasses.replace(
        attention, scale=attention.query_scale,
        biases=tuple(sorted(attention.biases)),
        rope_full=attention.rope_full if "full" in kinds else None,
        rope_sliding=attention.rope_sliding if "sliding" in kinds else None,
        sliding_window=(attention.sliding_window if "sliding" in kinds
                        else None))
  return dataclasses.replace(
      config, attention=attention, dropout=0.0,
      layer_pattern=tuple(layer.attention for layer in config.layers))
