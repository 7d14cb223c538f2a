"""A plan: what a job costs on a slice, as data that can be shown or kept."""
import dataclasses
import resource
import sys
import time
import typing

from jaxlm.plan import bounds as bounds_lib
from jaxlm.plan import compiled as compiled_lib
from jaxlm.plan import estimate as estimate_lib
from jaxlm.plan import flops, programs
from jaxlm.plan.devices import GIB
from jaxlm.plan.job import Job

# Of HBM, from which on XLA begins to compute again what does not fit.
TIGHT = 0.97
# Bytes from which on it matters how they are sent.
DEGRADED = 2 ** 26


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a job costs one device a step. Bytes, FLOPs and seconds.

  method: "compiled", "compiled --fast" or "estimate". state: bytes that stay
  between steps, by kind. wire: {"axes", "kind", "bytes"} of what it receives
  (and, compiled, "times": how many such collectives). bounds: as
  `bounds.Bounds`. tokens: of a step, on all devices.
  """
  model: str
  task: str
  slice: str
  devices: int
  mesh: dict[str, int]
  batch: int
  seq: int
  tokens: int
  weights: str
  method: str
  hbm: float
  state: dict[str, float]
  temporaries: float
  other: float
  total: float
  fits: bool
  useful_flops: float
  executed_flops: float
  kernel_flops: dict[str, float]
  wire: list[dict]
  bounds: dict[str, typing.Any]
  warnings: list[str]
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  host_memory: float | None = None
  versions: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def layout(self) -> str:
    return ",".join(f"{k}={v}" for k, v in self.mesh.items() if v > 1) or (
        "one device")

  @property
  def wire_bytes(self) -> float:
    return sum(row["bytes"] for row in self.wire)


def by_estimate(job: Job) -> Plan:
  """Raises ValueError if something does not divide over the mesh."""
  found = estimate_lib.estimate(job)
  wire = [{"axes": axes, "kind": kind, "bytes": nbytes}
          for (axes, kind), nbytes in found.wire.items()]
  return _plan(job, "estimate", found.state, found.temporaries, 0.0,
               found.total <= job.slice.device.hbm, found.useful,
               found.executed, {}, wire, _layout_warnings(job))


def by_compiling(job: Job, fast: bool = False, use_cache: bool = True) -> Plan:
  """Compiles the real program with libtpu.

  Raises:
    ValueError: there is no libtpu, or something does not divide.
  """
  start = time.perf_counter()
  mesh = programs.topology_mesh(job.slice, job.sizes)
  state = programs.bytes_by_kind(job, mesh)
  trace = programs.traced(job, mesh)
  counted = flops.count(trace.jaxpr, job.slice.size,
                        expert_rows=job.expert_rows)
  lowered = programs.lowered(trace, mesh)
  lowering = time.perf_counter() - start
  found = compiled_lib.compile_job(job, lowered, sum(state.values()), fast,
                                   use_cache)
  wire = [{"axes": axes, "kind": kind, "bytes": nbytes, "times": times}
          for axes, kind, times, nbytes in found.wire]
  warnings = _layout_warnings(job)
  for axes, kind, nbytes in found.degraded:
    if nbytes < DEGRADED:
      continue
    warnings.append(
        f"{kind} over {axes} became an all-reduce, which sends twice the "
        f"bytes ({nbytes / GIB:.2f} GiB): try other sizes of these axes")
  if job.task != "decode":  # which is a loop of unknown length, a token each
    warnings += sorted(counted.unknown)
  if fast:
    warnings.append("--fast: collectives and the time they take are not those "
                    "of the real program")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return _plan(
      job, "compiled --fast" if fast else "compiled", state,
      found.temporaries,
      found.arguments + found.outputs - sum(state.values()), found.fits,
      estimate_lib.useful_flops(job) / job.slice.size, counted.total,
      counted.kernels, wire, warnings,
      seconds={"trace and lower": lowering, "compile": found.seconds},
      host_memory=peak * (1 if sys.platform == "darwin" else 1024),
      versions=compiled_lib.versions())


def _plan(job, method, state, temporaries, other, fits, useful, executed,
          kernels, wire, warnings, **rest) -> Plan:
  device = job.slice.device
  resident = sum(state.values()) + other
  total = resident + temporaries
  if fits and total > TIGHT * device.hbm:
    warnings.append(f"{total / device.hbm:.0%} of HBM: XLA computes things "
                    "again to fit, which the bounds do not see")
  received = {(row["axes"], row["kind"]): row["bytes"] for row in wire}
  # A training step reads and writes all of its state, others read theirs.
  traffic = resident * (2 if job.task == "train" else 1)
  found = bounds_lib.bounds(job.slice, job.mesh_shape, useful, executed,
                            traffic, received)
  return Plan(
      job.model, job.task, job.slice.name, job.slice.size, job.mesh_shape,
      job.batch, job.seq, job.tokens, job.weights, method, device.hbm,
      {k: v for k, v in state.items() if v}, temporaries, other, total, fits,
      useful, executed, kernels, wire, dataclasses.asdict(found), warnings,
      **rest)


def _layout_warnings(job: Job) -> list[str]:
  if bounds_lib.aligned(job.slice, job.mesh_shape):
    return []
  return ["an axis of the mesh takes a part of a dimension of the torus: "
          "collectives along it share links with another's"]
