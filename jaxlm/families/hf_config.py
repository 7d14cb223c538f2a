"""Hugging Face's config.json: read field by field, nothing overlooked.

A field that nobody reads may change what the model computes, so it is refused
unless it is known not to (HARMLESS) or is off (null, false, 0, empty).
"""
import math
import typing

from jaxlm.config import (LinearScaling, Llama3Scaling, MLPConfig, ModelConfig,
                          RopeConfig, YarnScaling)

# Of the surroundings: files, tokens, training, generation, what is returned.
HARMLESS = frozenset("""
    _attn_implementation _name_or_path architectures attention_dropout auto_map
    begin_suppress_tokens bos_token_id cache_implementation
    decoder_start_token_id do_sample dtype early_stopping eos_token_id
    finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range keys_to_ignore_at_inference label2id length_penalty
    max_length max_new_tokens max_position_embeddings max_window_layers
    min_length model_type no_repeat_ngram_size num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits pad_token_id
    prefix pretraining_tp problem_type quantization_config
    repetition_penalty return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens
    task_specific_params temperature tokenizer_class top_k top_p torch_dtype
    transformers_version typical_p unsloth_fixed unsloth_version use_cache
    chunk_size_feed_forward""".split())

# What our config does not hold and a checkpoint keeps on its way through.
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id",
        "max_position_embeddings", "initializer_range")

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
               "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}

_SCALINGS = {
    LinearScaling: ("linear", {"factor": "factor"}),
    Llama3Scaling: ("llama3", {
        "factor": "factor", "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings"}),
    YarnScaling: ("yarn", {
        "factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
        "truncate": "truncate", "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "original_context": "original_max_position_embeddings"}),
}


# More layers or larger sizes would only fill the memory.
_MOST_LAYERS, _LARGEST = 1024, 2 ** 20


class Fields:
  """The fields of a config.json; `defaults` are of the family's own class."""

  def __init__(self, values: dict, defaults: dict):
    self._values, self._defaults, self._taken = values, defaults, set()

  def __call__(self, name: str, kind: type = int):
    """A field's value, of that type.

    Raises:
      ValueError: it is absent, null or of another type.
    """
    value = self.optional(name, kind)
    if value is None:
      raise ValueError(f"config.json lacks {name!r}")
    return value

  def optional(self, name: str, kind: type = int):
    """The same, or None where it is absent or null."""
    self._taken.add(name)
    value = self._values.get(name, self._defaults.get(name))
    if type(value) is int and abs(value) > _LARGEST:
      raise ValueError(f"config.json: {name}={value}: no model's is that large")
    if kind is float and type(value) is int:
      value = float(value)
    if value is not None and type(value) is not kind:
      raise ValueError(f"config.json: {name}={value!r}: expected "
                       f"{kind.__name__}")
    return value

  def only(self, name: str, *supported, default=None):
    """A field of which not every value is supported.

    Raises:
      NotImplementedError: it has another one.
    """
    self._taken.add(name)
    value = self._values.get(name, self._defaults.get(name, default))
    if value not in supported:
      raise NotImplementedError(
          f"config.json: {name}={value!r} is not supported: only "
          f"{' or '.join(map(repr, supported))}")
    return value

  def ignore(self, *names: str) -> None:
    """Fields that have no effect in this family."""
    self._taken.update(names)

  def finish(self) -> None:
    """Refuses fields that were not read.

    Raises:
      ValueError: there are some that may matter.
    """
    left = {name: value for name, value in self._values.items()
            if value and name not in self._taken and name not in HARMLESS}
    if left:
      raise ValueError(
          "config.json has fields that may change what the model computes and "
          f"are not known here: {left}. If they do not, delete them")

  def activation(self, name: str) -> str:
    return ACTIVATIONS[self.only(name, *ACTIVATIONS)]

  def head_dim(self) -> int:
    heads = self("num_attention_heads")
    return self.optional("head_dim") or self("hidden_size") // max(heads, 1)

  def num_layers(self) -> int:
    number = self("num_hidden_layers")
    if not 0 < number <= _MOST_LAYERS:
      raise ValueError(f"config.json: num_hidden_layers={number}: expected 1 "
                       f"to {_MOST_LAYERS}")
    return number

  def layer_pattern(self, default: typing.Callable[[int], bool]):
    """The shortest pattern of kinds; without layer_types, `default` says which
    layers (by index) slide."""
    num_layers = self.num_layers()
    names = self.optional("layer_types", list)
    if names is None:
      names = ["sliding_attention" if default(i) else "full_attention"
               for i in range(num_layers)]
    unknown = [name for name in names if name not in list(LAYER_TYPES)]
    if unknown:
      raise NotImplementedError(f"config.json: layer_types has {unknown}: only "
                                f"{list(LAYER_TYPES)} are supported")
    if len(names) != num_layers:
      raise ValueError(f"config.json: layer_types has {len(names)} entries for "
                       f"num_hidden_layers={num_layers}")
    kinds = [LAYER_TYPES[name] for name in names]
    period = next(p for p in range(1, num_layers + 1)
                  if all(kinds[i] == kinds[i % p] for i in range(num_layers)))
    return tuple(kinds[:period])

  def rope(self, kind: str, theta: str = "rope_theta",
           scaled: bool = True) -> RopeConfig:
    """The rotary positions of layers of a kind.

    They are in rope_parameters (transformers 5), perhaps by kind, or in
    rope_theta and rope_scaling.

    Args:
      theta: the old field of their base.
      scaled: whether the old rope_scaling applies to this kind.
    """
    old = self.optional("rope_scaling", dict)
    values = self.optional("rope_parameters", dict)
    if not old and not values:
      values = self._defaults.get("rope_parameters")
    values = dict(values or {})
    if any(name in values for name in LAYER_TYPES):
      name = next(n for n, k in LAYER_TYPES.items() if k == kind)
      values = values.get(name)
      if not isinstance(values, dict):
        raise ValueError(f"config.json: rope_parameters[{name!r}]={values!r}: "
                         "expected an object")
      values = dict(values)
    elif old:
      values = dict(old) if scaled else {}
    base = values.pop("rope_theta", None)
    if base is None:
      base = self(theta, float)
    self.ignore(theta)
    if type(base) not in (int, float):
      raise ValueError(f"config.json: rope_theta={base!r}: expected a number")
    return RopeConfig(float(base), self._scaling(values))

  def _scaling(self, values: dict):
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    if values.get("partial_rotary_factor") == 1:
      del values["partial_rotary_factor"]
    if kind == "default":
      cls, names = None, {}
    else:
      for cls, (name, names) in _SCALINGS.items():
        if name == kind:
          break
      else:
        raise NotImplementedError(
            f"config.json: rope_type={kind!r} is not supported: only default, "
            f"{', '.join(name for name, _ in _SCALINGS.values())}")
    arguments = {ours: values.pop(theirs) for ours, theirs in names.items()
                 if theirs in values}
    if cls is not None and "original_context" in names:
      arguments.setdefault("original_context",
                           self("max_position_embeddings"))
    if cls is YarnScaling:
      arguments.setdefault("truncate", True)
      _mscales(arguments)
    if cls is not None and "factor" not in arguments:
      raise ValueError(f"config.json: rope of type {kind!r} lacks 'factor'")
    scaling = cls and cls(**_numbers(cls, arguments))
    if cls is YarnScaling and _is_usual(values, scaling.rotation_factor):
      values.pop("attention_factor", None)
    left = {name: value for name, value in values.items() if value is not None}
    if left:
      raise NotImplementedError(
          f"config.json: rope of type {kind!r} has {left}, not supported")
    return scaling


def _is_usual(values: dict, factor: float) -> bool:
  """Whether a given factor of cos and sin is the one YaRN has anyway."""
  given = values.get("attention_factor")
  return given is None or math.isclose(given, factor)


def _mscales(arguments: dict) -> None:
  """YaRN's two mscales, which transformers heeds only together."""
  given = [name for name in ("mscale", "mscale_all_dim")
           if arguments.get(name)]
  if given == ["mscale_all_dim"]:
    raise NotImplementedError(
        f"config.json: rope has mscale_all_dim={arguments['mscale_all_dim']} "
        "without mscale, not supported: give both or none")
  if len(given) < 2:
    arguments.pop("mscale", None)
    arguments.pop("mscale_all_dim", None)


def _numbers(cls, arguments: dict) -> dict:
  """The arguments in the types that the dataclass declares."""
  hints = typing.get_type_hints(cls)
  result = {}
  for name, value in arguments.items():
    if (type(value) not in ((bool,) if hints[name] is bool else (int, float))
        or not -_LARGEST <= value <= _LARGEST):
      raise ValueError(f"config.json: rope's {name}={value!r}: expected "
                       f"{hints[name].__name__}")
    result[name] = hints[name](value)
  return result


def rope_scaling(config: RopeConfig) -> dict | None:
  """The old field of a scaling."""
  if config.scaling is None:
    return None
  name, names = _SCALINGS[type(config.scaling)]
  values = {theirs: getattr(config.scaling, ours)
            for ours, theirs in names.items()}
  if values.get("mscale_all_dim") == 0:
    del values["mscale"], values["mscale_all_dim"]
  return {"rope_type": name, **values}


def activation_name(config: MLPConfig, prefer: str) -> str:
  """Theirs of an activation, `prefer` if it is the same."""
  if ACTIVATIONS.get(prefer) == config.activation:
    return prefer
  return next((theirs for theirs, ours in ACTIVATIONS.items()
               if ours == config.activation), config.activation)


def layer_types(config: ModelConfig) -> list[str]:
  names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
  return [names[layer.attention] for layer in config.layers]
