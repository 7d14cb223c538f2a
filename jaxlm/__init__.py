"""Open mixture-of-experts language models in JAX."""
import importlib

from jaxlm.config import (AttentionConfig, LinearScaling, Llama3Scaling,
                          MLAConfig, MLPConfig, MoEConfig, ModelConfig,
                          NormConfig, RopeConfig, RouterConfig, YarnScaling)
from jaxlm.families import preset, presets

# These need jax, which takes a second to import: they come on first use.
_FROM_MODEL = ("Execution", "abstract_params", "forward", "init_params",
               "logits")

__all__ = [
    "AttentionConfig", "LinearScaling", "Llama3Scaling", "MLAConfig",
    "MLPConfig", "MoEConfig", "ModelConfig", "NormConfig", "RopeConfig",
    "RouterConfig", "YarnScaling", "preset", "presets", *_FROM_MODEL]


def __getattr__(name: str):
  if name in _FROM_MODEL:
    return getattr(importlib.import_module("jaxlm.model.transformer"), name)
  raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
