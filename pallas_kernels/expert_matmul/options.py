import typing


class Options(typing.NamedTuple):
  """What is no array: hashable, and the same for every implementation."""
  swiglu_limit: float | None = None
  blocks: typing.Any = None
  interpret: typing.Any = False
