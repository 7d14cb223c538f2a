"""The Pallas kernels on an NVIDIA GPU, against their peers and its limits.

  python -m experiments.benchmarks.kernels_gpu [attention ...] [--help]

Needs jax[cuda] and a GPU; torch with CUDA is a peer where it is there. Prints
one JSON line per figure: the median of repeats, the ratio to a peer's, and as
a fraction of it the time that the bytes alone would need at the rate of a
large copy, measured in the same run.
"""
import argparse
import os
import sys

# Torch is to find memory too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from experiments.benchmarks import kernels_gpu_attention, kernels_gpu_experts
from experiments.benchmarks.gpu_timing import copy_rate, report

PARTS = {"attention": kernels_gpu_attention.run,
         "experts": kernels_gpu_experts.run}


def main():
  parser = argparse.ArgumentParser(
      description=__doc__.split("\n")[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("parts", nargs="*", metavar="PART", default=list(PARTS),
                      help=f"of {', '.join(PARTS)}")
  parser.add_argument("--repeats", type=int, default=9, help="runs timed")
  parser.add_argument("--lengths", type=int, nargs="+", metavar="T",
                      default=[8192, 32768, 131072],
                      help="of the sequences attended")
  parser.add_argument("--no-peer", action="store_true",
                      help="leave other implementations out")
  flags = parser.parse_args()
  if wrong := set(flags.parts) - set(PARTS):
    parser.error(f"no part {', '.join(sorted(wrong))}: use {', '.join(PARTS)}")
  if jax.default_backend() != "gpu":
    sys.exit(f"kernels_gpu: jax {jax.__version__} finds no NVIDIA GPU, only "
             f"{jax.devices()[0].device_kind}: install jax[cuda12] on a "
             "machine where nvidia-smi shows one")
  rate = copy_rate(flags.repeats)
  report(figure="copy", device=jax.devices()[0].device_kind,
         jax=jax.__version__, gb_per_second=round(rate / 1e9))
  for part in flags.parts:
    PARTS[part](flags, rate)


if __name__ == "__main__":
  main()
