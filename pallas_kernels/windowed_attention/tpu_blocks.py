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
class Blocks:
  """What `blocks=` takes; None stands for the default."""
  forward: ForwardBlocks | None = None


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
