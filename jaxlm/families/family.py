"""What an architecture is to Hugging Face: its config.json and its names."""
import dataclasses
from collections.abc import Callable

from jaxlm.config import AttentionConfig, MLAConfig, ModelConfig
from jaxlm.convert.rules import Rule


@dataclasses.dataclass(frozen=True)
class Family:
  """A `model_type`, whose class for text is `architecture`.

  `from_hf_config` raises ValueError or NotImplementedError, naming the field,
  for what our config cannot say; `to_hf_config` may write less than the config
  says: `families.hf_family` reads it back. Only models with this type of
  `attention`, and with experts (`moe`) or without, are asked of it.

  `renames` are (regular expression, replacement) for names in files that some
  publish with another prefix. `left_out` matches whole names, after renaming,
  that are no weights of the text model; those that `vision` matches are left
  out too, with a warning, and so are, if it `predicts_further`, the layers
  after the last, which predict more tokens than the next.
  """
  model_type: str
  architecture: str
  from_hf_config: Callable[[dict], ModelConfig]
  to_hf_config: Callable[[ModelConfig], dict]
  rules: tuple[Rule, ...]
  renames: tuple[tuple[str, str], ...] = ()
  left_out: str = r".*\.rotary_emb\.inv_freq"
  vision: str = ""
  moe: bool = False
  attention: type[AttentionConfig] | type[MLAConfig] = AttentionConfig
  predicts_further: bool = False
