"""A job compiled ahead of time, and what the compiler says of it."""
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import tempfile
import time

import jax

from jaxlm.data.tokenizers import cache_dir
from jaxlm.plan import hlo
from jaxlm.plan.job import Job

# Of what is kept; another number forgets it.
FORMAT = 1
_UNITS = {"": 1, "K": 2 ** 10, "M": 2 ** 20, "G": 2 ** 30, "T": 2 ** 40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a compiler said. Bytes are of one device.

  arguments, outputs: those the program is given, and new ones it returns.
  temporaries: with its code. total: of all; where it did not fit, what it
  would have needed (temporaries are then what remains).
  wire: [axes, kind, times, bytes received] of the collectives.
  degraded: [axes, kind, bytes] of those that became an all-reduce.
  """
  arguments: int
  outputs: int
  temporaries: int
  total: int
  fits: bool
  wire: list
  degraded: list
  seconds: float
  cached: bool = False


def compile_job(job: Job, lowered, arguments: int, fast: bool = False,
                use_cache: bool = True) -> Compiled:
  """Compiles, or finds what was said the last time.

  Args:
    arguments: bytes, for a program that does not fit.
    fast: with few optimizations: a third of the time, memory within 1 %, but
      collectives are not those of the real program.
  """
  path = _path(lowered, job, fast)
  if use_cache and path.exists():
    with contextlib.suppress(ValueError, TypeError):
      return Compiled(**json.loads(path.read_text()), cached=True)
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as directory, _optimizing(not fast):
    try:
      # libtpu writes the program down: what it hands over jaxlib cannot always
      # read ("async-update instruction should have 1 operands").
      program = lowered.compile(compiler_options={"xla_dump_to": directory})
    except jax.errors.JaxRuntimeError as error:
      needed = exhausted(str(error))
      if needed is None:
        raise
      found = Compiled(arguments, 0, max(0, needed - arguments), needed, False,
                       [], [], time.perf_counter() - start)
    else:
      seconds = time.perf_counter() - start
      [path_of_text] = pathlib.Path(directory).glob("*.after_optimizations.txt")
      found = _read(program, path_of_text.read_text(), job, seconds)
  values = dataclasses.asdict(found)
  del values["cached"]
  _write(path, json.dumps(values))
  return found


def exhausted(message: str) -> int | None:
  """The bytes that a program would have needed, if that is what it says."""
  match = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
  return match and int(float(match[1]) * _UNITS[match[2]])


def _read(program, text: str, job, seconds) -> Compiled:
  memory = program.memory_analysis()
  temporaries = (memory.temp_size_in_bytes
                 + memory.generated_code_size_in_bytes)
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  wire, degraded = {}, {}
  for one in hlo.collectives(text, job.mesh_shape):
    axes = "+".join(one.axes)
    total = wire.setdefault((axes, one.kind), [0, 0.0])
    total[0] += one.times
    total[1] += one.times * one.wire
    if one.degraded:
      key = axes, one.degraded
      degraded[key] = degraded.get(key, 0.0) + one.times * one.wire
  return Compiled(
      memory.argument_size_in_bytes, outputs, temporaries,
      memory.argument_size_in_bytes + outputs + temporaries, True,
      [[*key, *total] for key, total in wire.items()],
      [[*key, total] for key, total in degraded.items()], seconds)


@contextlib.contextmanager
def _optimizing(fully: bool):
  before = jax.config.jax_optimization_level
  if not fully:
    jax.config.update("jax_optimization_level", "O0")
  try:
    yield
  finally:
    jax.config.update("jax_optimization_level", before)


def versions() -> dict[str, str]:
  found = {}
  for package in ("jax", "libtpu"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def _path(lowered, job, fast) -> pathlib.Path:
  key = [FORMAT, versions(), job.slice.name, job.mesh_shape, fast,
         os.environ.get("LIBTPU_INIT_ARGS"), lowered.as_text()]
  name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
  return cache_dir() / "plan" / f"{name}.json"


def _write(path: pathlib.Path, text: str):
  """Whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
    file.write(text)
  os.replace(file.name, path)
