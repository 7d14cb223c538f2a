"""Configs as JSON-able values and back."""
import dataclasses
import difflib
import types
import typing


def to_dict(config) -> dict:
  """A config as JSON-able values; sub-configs of a union carry their type."""
  result = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      value = {"type": type(value).__name__, **to_dict(value)}
    result[field.name] = list(value) if isinstance(value, tuple) else value
  return result


def from_dict(cls, values: dict, path: str = ""):
  """The inverse of `to_dict`; an unknown key or wrong type is refused."""
  where = path or cls.__name__
  if not isinstance(values, dict):
    raise ValueError(f"{where}={values!r}: expected a mapping of the fields "
                     f"of {cls.__name__}")
  if values.get("type", cls.__name__) != cls.__name__:
    raise ValueError(f"{where}.type={values['type']!r}: use {cls.__name__!r}")
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls)}
  values = {k: v for k, v in values.items() if k != "type"}
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, 1)
      raise ValueError(
          f"{where} has no field {key!r}: "
          + (f"did you mean {near[0]!r}?" if near
             else f"its fields are {', '.join(fields)}"))
  missing = [name for name, field in fields.items()
             if name not in values and field.default is dataclasses.MISSING
             and field.default_factory is dataclasses.MISSING]
  if missing:
    raise ValueError(f"{where} lacks {', '.join(missing)}")
  return cls(**{key: _parse(hints[key], value, f"{where}.{key}")
                for key, value in values.items()})


def _parse(hint, value, path: str):
  choices = (typing.get_args(hint)
             if isinstance(hint, types.UnionType) else (hint,))
  if value is None and type(None) in choices:
    return None
  configs = [c for c in choices if dataclasses.is_dataclass(c)]
  if configs:
    if type(value) in configs:
      return value
    names = [c.__name__ for c in configs]
    if not isinstance(value, dict):
      raise ValueError(f"{path}={value!r}: expected a mapping of the fields "
                       f"of {' or '.join(names)}")
    name = value.get("type")
    named = [c for c in configs if c.__name__ == name]
    if len(configs) > 1 and not named:
      raise ValueError(f"{path}.type={name!r}: use one of {names}")
    return from_dict((named or configs)[0], value, path)
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if isinstance(value, (list, tuple)):
      return tuple(_parse(item, v, f"{path}[{i}]")
                   for i, v in enumerate(value))
  elif float in choices and type(value) in (int, float):
    return float(value)
  elif type(value) in choices:
    return value
  raise ValueError(f"{path}={value!r}: expected "
                   f"{getattr(hint, '__name__', hint)}, got "
                   f"{type(value).__name__}")
