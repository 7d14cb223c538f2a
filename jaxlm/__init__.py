"""Open mixture-of-experts language models in JAX."""
import importlib

from jaxlm.config import (AttentionConfig, LinearScaling, Llama3Scaling,
                          MLAConfig, MLPConfig, MoEConfig, ModelConfig,
                          NormConfig, RopeConfig, RouterConfig, YarnScaling)
from jaxlm.families import preset, presets

# These need jax, which takes a second to import: they come on first use.
_LATER = {
    "jaxlm.model.transformer": ("Execution", "abstract_params", "forward",
                                "init_params", "logits"),
    "jaxlm.lm": ("LM", "load", "save")}
_MODULE_OF = {name: module for module, names in _LATER.items()
              for name in names}

__all__ = [
    "AttentionConfig", "LinearScaling", "Llama3Scaling", "MLAConfig",
    "MLPConfig", "MoEConfig", "ModelConfig", "NormConfig", "RopeConfig",
    "RouterConfig", "YarnScaling", "preset", "presets", *_MODULE_OF]


def __getattr__(name: str):
  if name in _MODULE_OF:
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
  raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
