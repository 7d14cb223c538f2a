"""Sizes of the TPU kernels' blocks, and those found best per generation."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
  """Sizes of the forward kernels' blocks.

  queries: positions of a grid step, a multiple of 128.
  keys: of a grid step of the kernel with a running softmax; likewise.
  """
  queries: int = 1024
  keys: int = 1024


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What `blocks=` takes; None stands for the default."""
  forward: ForwardBlocks | None = None


# Of a core's VMEM (128 MiB on v5e and v6e, else 64), what a kernel may use.
VMEM_LIMIT = {"v5e": 96 << 20, "v6e": 96 << 20, "v5p": 44 << 20,
              "7x": 36 << 20}


def vmem_limit(generation: str | None) -> int | None:
  return VMEM_LIMIT.get(generation)
