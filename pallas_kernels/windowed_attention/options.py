import typing


class Options(typing.NamedTuple):
  """What is no array: hashable, and the same for every implementation."""
  window: int | None
  scale: float
  soft_cap: float | None = None
  q_offset: int = 0
  blocks: typing.Any = None
  interpret: typing.Any = False


class CacheOptions(typing.NamedTuple):
  """The same of attention over a cache."""
  window: int | None
  scale: float
  soft_cap: float | None = None
  v_head_dim: int | None = None
  blocks: typing.Any = None
  interpret: typing.Any = False
