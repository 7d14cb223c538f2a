"""What the C library does with memory that a step frees."""
import ctypes
import platform

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
  """Keeps freed memory in the process, for training on the CPU.

  XLA takes a step's temporaries from malloc and frees them at its end. glibc
  hands gigabytes back to the system, which zeroes every page again when the
  next step touches it: a fifth of the time of a step of the benchmark's model.
  Affects the whole process; call it before anything large is allocated. Returns
  whether it had any effect (it has none without glibc).
  """
  if platform.libc_ver()[0] != "glibc":
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all([mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_MMAP_MAX, 0),
              mallopt(M_ARENA_MAX, 1)])
