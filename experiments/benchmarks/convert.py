"""Converting a checkpoint against a plain copy of the same files.

  python -m experiments.benchmarks.convert [--layers 4] [--directory DIR]

Writes a checkpoint with the sizes of gpt-oss-20b but fewer layers, experts in
MXFP4 and the rest in bfloat16, with random bytes, as Hugging Face's; then
copies it, and converts it to jaxlm's own format, back, and to OpenAI's. Every
input is dropped from the page cache before, every output flushed to the disk.
Prints one JSON line per figure: GB per second of input, and the time against
the copy's, which is made before and after.
"""
import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

import jaxlm
from jaxlm.convert import formats
from jaxlm.convert.checkpoint import Checkpoint, leaf_shapes
from jaxlm.convert.tensors import Tensor
from pallas_kernels.quant import MXFP4


def write_random(directory: pathlib.Path, num_layers: int):
  config = dataclasses.replace(jaxlm.preset("gpt-oss-20b"),
                               num_layers=num_layers)
  packed = {f"layers/{i}/moe/{name}": MXFP4 for i in range(num_layers)
            for name in ("gate_up", "down")}
  rng = np.random.default_rng(0)

  def tensor(name, shape):
    packed = name.endswith(("/blocks", "/scales"))
    dtype = np.dtype(np.uint8 if packed else ml_dtypes.bfloat16)

    def read():
      if packed:
        return rng.integers(0, 128, shape, np.uint8)
      return rng.standard_normal(shape, np.float32).astype(dtype)

    return Tensor(shape, dtype, read)

  formats.write(Checkpoint(config, {
      name: tensor(name, shape)
      for name, shape in leaf_shapes(config, packed).items()}),
                directory, "hf")


def size(directory: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in directory.rglob("*")
             if path.is_file())


def timed(source: pathlib.Path, run) -> float:
  """Seconds of a call that reads `source` from the disk and writes to it."""
  os.sync()
  for path in filter(pathlib.Path.is_file, source.rglob("*")):
    with path.open("rb") as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  begin = time.perf_counter()
  run()
  os.sync()
  return time.perf_counter() - begin


def converted(source: pathlib.Path, destination: pathlib.Path, to: str):
  """In a process of its own, as the command is."""
  subprocess.run([sys.executable, "-m", "jaxlm.cli", "convert", str(source),
                  str(destination), "--to", to], check=True,
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main():
  parser = argparse.ArgumentParser(
      description=__doc__.split("\n")[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("--layers", type=int, default=4, help="an even number")
  parser.add_argument("--directory", type=pathlib.Path,
                      help="where to write (default: for temporary files)")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=flags.directory) as folder:
    folder = pathlib.Path(folder)
    hf, copy = folder / "hf", folder / "copy"
    write_random(hf, flags.layers)

    def copied():
      seconds = timed(hf, lambda: shutil.copytree(hf, copy))
      shutil.rmtree(copy)
      return seconds

    before, found = copied(), {}
    for name, source, to in (("hf to native", hf, "native"),
                             ("native to hf", folder / "native", "hf"),
                             ("hf to openai", hf, "openai")):
      destination = folder / (to if to != "hf" else "back")
      found[name] = timed(source,
                          lambda: converted(source, destination, to))
    limit = (before + copied()) / 2
    nbytes = size(hf)
    for name, seconds in {"copy": limit, **found}.items():
      print(json.dumps({
          "figure": "convert", "what": name, "gb": round(nbytes / 1e9, 2),
          "gb_per_second": round(nbytes / seconds / 1e9, 2),
          "times_the_copy": round(seconds / limit, 2)}), flush=True)


if __name__ == "__main__":
  main()
