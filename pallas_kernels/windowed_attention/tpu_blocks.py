"""Sizes of the TPU kernels' blocks, and those found best per generation."""
import dataclasses
import typing


class Shape(typing.NamedTuple):
  """What the forward kernels' sizes depend on."""
  num_queries: int
  head_dim: int
  group: int  # query heads of a key head
  window: int | None
  plain: bool  # no soft cap, no segments, no offset


@dataclasses.dataclass(frozen=True)
class RunningBlocks:
  """Sizes of the kernel with a running softmax, for any window.

  queries, keys: positions of a grid step, multiples of 128.
  """
  queries: int = 512
  keys: int = 512

  def __post_init__(self):
    for name in ("queries", "keys"):
      if (size := getattr(self, name)) < 128 or size % 128:
        raise ValueError(f"{name}={size} of a block: use a multiple of 128")


@dataclasses.dataclass(frozen=True)
class FoldBlocks:
  """Sizes of the kernel for windows of a multiple of 128, without segments,
  soft cap or offset.

  queries: positions of a grid step, a multiple of the window.
  rows: queries of a tile, 32, 64 or 128.
  heads: query heads of a tile, which are rows * heads lanes.
  lead, lag: tiles by which scores and output are apart from the softmax.
  """
  queries: int = 1024
  rows: int = 128
  heads: int = 1
  lead: int = 2
  lag: int = 1

  def __post_init__(self):
    if self.rows not in (32, 64, 128):
      raise ValueError(f"rows={self.rows} of a tile: use 32, 64 or 128")
    if self.heads < 1 or self.rows * self.heads % 128:
      raise ValueError(f"{self.heads} heads of {self.rows} rows are no whole "
                       f"registers of 128 lanes: use {128 // self.rows}")
    if self.lead < 0 or self.lag < 0:
      raise ValueError(f"lead={self.lead}, lag={self.lag}: use 0 or more")

  def unfit(self, shape: Shape) -> str | None:
    """Why the kernel cannot do this with these sizes; None if it can."""
    if not shape.plain or shape.window is None or shape.window % 128:
      return ("needs a window of a multiple of 128, and no segments, soft cap "
              f"or offset; window={shape.window}: use RunningBlocks")
    if self.queries % shape.window:
      return (f"queries={self.queries} are no multiple of the window "
              f"{shape.window}: use {shape.window}")
    if shape.group % self.heads:
      return (f"the {shape.group} query heads of a key head do not come in "
              f"tiles of {self.heads}: use a divisor")
    return None


@dataclasses.dataclass(frozen=True)
class BackwardBlocks:
  """Sizes of the backward kernels' blocks.

  rows: queries, and keys, of a grid step, a multiple of 128.
  lanes: queries, of one head or several, scored together: 128 or 256, as wide
    as the matrix unit's array.
  sub: of these, so many of a head where a narrow window is masked by the
    matrix unit: 16 to 128.
  lead, lag: by how many items' scores the matrix unit is ahead of the softmax,
    and this ahead of the gradients.
  """
  rows: int = 1024
  lanes: int = 256
  sub: int = 64
  lead: int = 2
  lag: int = 1

  def __post_init__(self):
    if self.rows < 128 or self.rows % 128:
      raise ValueError(f"rows={self.rows} of a block: use a multiple of 128")
    if self.lanes not in (128, 256):
      raise ValueError(f"lanes={self.lanes} of a block: use 128 or 256")
    if self.sub not in (16, 32, 64, 128):
      raise ValueError(f"sub={self.sub} of a block: use 16, 32, 64 or 128")
    if min(self.lead, self.lag) < 0:
      raise ValueError(f"lead={self.lead} and lag={self.lag} of a block: use "
                       "0 or more")


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What `blocks=` takes; None stands for the default."""
  forward: RunningBlocks | FoldBlocks | None = None
  backward: BackwardBlocks | None = None


# Of a core's VMEM (128 MiB on v5e and v6e, else 64), what a kernel may use.
VMEM_LIMIT = {"v5e": 64 << 20, "v6e": 64 << 20, "v5p": 44 << 20,
              "7x": 36 << 20}


def vmem_limit(generation: str | None) -> int | None:
  return VMEM_LIMIT.get(generation)


def _up(size, unit):
  return -(-size // unit) * unit


def forward_blocks(shape: Shape, generation: str | None
                   ) -> RunningBlocks | FoldBlocks:
  """The best known."""
  size = min(512, _up(shape.num_queries, 128))
  running = RunningBlocks(size, size)
  if shape.window is None or shape.window > 1024:
    return running
  # A step fills and drains the pipeline of tiles once: of v6e's cycles 5 % at
  # 1024. v5e would gain 2 %, and v5p and 7x have not the VMEM.
  large = shape.head_dim <= 64 or generation == "v6e"
  queries = min(2048 if large else 1024, _up(shape.num_queries, 128))
  heads = 2 if shape.group % 2 == 0 else 1
  rows = 64 if generation in ("v4", "v5e", "v5p") and heads == 2 else 128
  # More tiles of wide windows in flight would spill more than VMEM holds.
  wide = (2, 1) if generation in ("v5e", "v6e") else (1, 1)
  lead, lag = (3, 2) if shape.window <= 256 else wide
  fold = FoldBlocks(_up(queries, shape.window), rows, heads, lead, lag)
  return running if fold.unfit(shape) else fold


def backward_blocks(generation: str | None) -> BackwardBlocks:
  if generation in ("v4", "v5e", "v5p"):
    return BackwardBlocks(lanes=128, sub=32)
  return BackwardBlocks()
