"""Sizes of the TPU kernels' blocks, and those found best per generation."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
  """Sizes of the forward kernels' blocks.

  queries: positions of a grid step, a multiple of 128.
  keys: of a grid step of the kernel with a running softmax; likewise.
  """
  queries: int = 512
  keys: int = 512

  def __post_init__(self):
    for name in ("queries", "keys"):
      if (size := getattr(self, name)) < 128 or size % 128:
        raise ValueError(f"{name}={size} of a block: use a multiple of 128")


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
  forward: ForwardBlocks | None = None
  backward: BackwardBlocks | None = None


# Of a core's VMEM (128 MiB on v5e and v6e, else 64), what a kernel may use.
VMEM_LIMIT = {"v5e": 96 << 20, "v6e": 96 << 20, "v5p": 44 << 20,
              "7x": 36 << 20}


def vmem_limit(generation: str | None) -> int | None:
  return VMEM_LIMIT.get(generation)


def forward_blocks(blocks, num_queries, window) -> ForwardBlocks:
  """Those given, or the default for so many queries."""
  if blocks is not None:
    return blocks
  size = max(128, min(512, num_queries // 128 * 128))
  return ForwardBlocks(size, size)


def backward_blocks(generation: str | None) -> BackwardBlocks:
  if generation in ("v4", "v5e", "v5p"):
    return BackwardBlocks(lanes=128, sub=32)
  return BackwardBlocks()
