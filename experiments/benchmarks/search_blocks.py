"""Block sizes of a TPU kernel by their estimated cycles, without a TPU.

  python -m experiments.benchmarks.search_blocks "window 128, forward" v6e

Compiles the kernel with every combination of the sizes below, and prints them
from the best to the worst, then those that its dataclass or the compiler
refuses. What is found best goes into the defaults of the dataclass. Needs
libtpu.
"""
import argparse
import itertools
import json

from experiments.benchmarks import kernels_tpu, tpu_static

# By the job of a case: sizes to try.
SIZES = {
    "attention": {"queries": (512, 1024, 2048), "rows": (64, 128),
                  "heads": (1, 2, 4), "lead": (1, 2, 3), "lag": (1, 2)},
    "attention_backward": {"rows": (512, 1024), "lanes": (128, 256),
                           "sub": (32, 64, 128), "lead": (1, 2),
                           "lag": (1, 2)},
    "decode": {"sequences": (4, 8, 16), "together": (1, 2, 4)},
    "experts": {"columns": (640, 1152, 1920, 2944), "depth": (128, 256, 512)},
}


def candidates(name: str) -> list[dict]:
  case = kernels_tpu.CASES[name]
  sizes = SIZES[case.job]
  return [dict(zip(sizes, values))
          for values in itertools.product(*sizes.values())]


def search(name: str, generation: str):
  """(share of the roofline, sizes), the best first; and (error, sizes) of
  those that do not compile."""
  tried = candidates(name)
  found, failed = [], []
  for sizes, cycles in zip(tried, kernels_tpu.cycles_of(
      [(name, sizes) for sizes in tried], generation)):
    if isinstance(cycles, str):
      failed.append((cycles, sizes))
    else:
      row = kernels_tpu.figure(name, generation, cycles)
      found.append((row["percent"], sizes))
  return sorted(found, key=lambda x: -x[0]), failed


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("kernel", choices=kernels_tpu.CASES)
  parser.add_argument("generation", choices=tpu_static.GENERATIONS)
  arguments = parser.parse_args()
  found, failed = search(arguments.kernel, arguments.generation)
  for percent, sizes in found:
    print(json.dumps({"percent": percent} | sizes))
  for error, sizes in failed:
    print(json.dumps(sizes | {"error": error}))
  raise SystemExit(not found)


if __name__ == "__main__":
  main()
