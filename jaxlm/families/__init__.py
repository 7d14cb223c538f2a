"""The published models: one file an architecture, one name a size."""
import difflib

from jaxlm.config import ModelConfig
from jaxlm.families import (deepseek_v3, gemma2, gemma3, gpt2, gpt_oss, llama,
                            mixtral, qwen2, qwen3)

_PRESETS = {
    name: config
    for family in (gpt2, llama, qwen2, qwen3, gemma2, gemma3, mixtral,
                   deepseek_v3, gpt_oss)
    for name, config in family.PRESETS.items()}


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
