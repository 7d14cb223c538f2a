"""TPU programs compiled, and their cycles estimated, without a TPU.

libtpu compiles for every generation on any machine, and can write down how
many cycles the bundles of the final schedule take: a simulation, not a
measurement. It knows waits for the memory, but neither its contention (so a
time here is never less than the bytes over the bandwidth) nor branches that
depend on data (taken for not taken: kernels are measured with schedules that
follow from the grid alone). It stops the process at what it does not know,
which is why estimates are made in a process of their own.
"""
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import numpy as np

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: it restricts nothing
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Generation:
  """One device: a chip, of 7x one of its two cores. clock in Hz, flops of
  bfloat16 and HBM's bandwidth in bytes a second, as published."""
  topology: str
  clock: float
  flops: float
  bandwidth: float
  bounds: tuple[int, ...] | None = None


GENERATIONS = {
    "v5e": Generation("v5e:1x1", 1.5e9, 197e12, 819e9, (1, 1, 1)),
    "v5p": Generation("v5p:1x1x1", 1.75e9, 459e12, 2765e9),
    "v6e": Generation("v6e:1x1", 1.75e9, 918e12, 1640e9, (1, 1, 1)),
    "7x": Generation("tpu7x:1x1x1", 2.2e9, 1153.5e12, 3690e9),
}


@functools.cache
def _mesh(generation: str) -> jax.sharding.Mesh:
  from jax.experimental import topologies
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  known = GENERATIONS[generation]
  options = {"chips_per_host_bounds": known.bounds} if known.bounds else {}
  devices = topologies.get_topology_desc(
      platform="tpu", topology_name=known.topology, **options).devices
  return jax.sharding.Mesh(np.array(devices[:1]), ("x",))


def lower_for(generation: str, function, *arguments):
  """`function` lowered for one device; arguments may be anything with a shape
  and a dtype. `.compile()` compiles it."""
  mesh = _mesh(generation)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding), arguments)
  # Kernels ask for the chip while they are lowered.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function, out_shardings=sharding).lower(*arguments)


def estimate(generation: str, jobs: list[tuple[str, dict]]) -> list[dict]:
  """For each job {"cycles": by kernel}, or {"error": what libtpu said}.

  A job names a function, "module:function", and gives keyword arguments; it
  returns what `lower_for` takes after the generation.
  """
  results = []
  while len(results) < len(jobs):
    found, error = _worker(generation, jobs[len(results):])
    results += found
    if len(results) < len(jobs):
      results.append({"error": error})  # where the process stopped
  return results


def _worker(generation, jobs) -> tuple[list[dict], str]:
  with tempfile.TemporaryDirectory() as directory:
    flags = (f"--xla_jf_dump_static_llo_profile_to={directory} "
             "--xla_tpu_check_llo_types=false")
    process = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.tpu_static",
         generation, directory], input=json.dumps(jobs), text=True,
        capture_output=True,
        env=os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags})
  lines = [line for line in process.stdout.splitlines()
           if line.startswith('{"')]
  return ([json.loads(line) for line in lines],
          process.stderr[-400:] or f"exit status {process.returncode}")


def _read_cycles(directory: pathlib.Path) -> dict[str, int]:
  cycles = {}
  for path in directory.glob("*_static_llo_profile.textproto"):
    for match in re.finditer(r"hlo_op_estimate \{(.*?)\n\}", path.read_text(),
                             re.DOTALL):
      name, count = (re.search(pattern, match[1]) for pattern in (
          r'hlo_op_name: "(.*?)"', r"estimated_cycles: (\d+)"))
      if name and count:
        cycles[name[1]] = int(count[1])
  return cycles


def main():
  generation, directory = sys.argv[1], pathlib.Path(sys.argv[2])
  for name, kwargs in json.load(sys.stdin):
    for path in directory.iterdir():
      path.unlink()
    module, function = name.split(":")
    try:
      job = getattr(importlib.import_module(module), function)(**kwargs)
      lower_for(generation, *job).compile()
      result = {"cycles": _read_cycles(directory)}
    except Exception as error:  # the compiler's, of many kinds
      result = {"error": f"{type(error).__name__}: {error}"[:400]}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
