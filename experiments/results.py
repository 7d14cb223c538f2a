"""The files of an ablation: what the runner writes and the report reads.

  WORKDIR/ablation.json                     Ablation: the plan, before any run
  WORKDIR/arms/ARM/seed_N/metrics.jsonl     one line a logged step
  WORKDIR/arms/ARM/seed_N/result.json       Run: written when the run ends
  WORKDIR/arms/ARM/speed.json               Speed: written once for the arm

A line of metrics.jsonl has `step`, `loss` (training, nats a token), `tokens`
(seen so far) and `seconds`; on evaluation steps also `eval_loss`,
`eval_bits_per_byte` and, of expert layers, `load`: [layers][experts], the share
of the held-out routed tokens that each expert got. Whatever else is there is
ignored. JSON files appear whole or not at all.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import tempfile

from experiments.claims import Claim
from experiments.scaling import Trend


@dataclasses.dataclass(frozen=True)
class Arm:
  """One architecture of the ablation, or one way to train it.

  identity: a hash of all that decides its results but the seed and the code.
  quantities: what describes it, by name. `total_params`, `active_params` and
    `flops_per_token` are required; dimensions (num_layers, d_model,
    num_experts, ...) follow in the order in which the report shows them.
  """
  name: str
  description: str
  quantities: dict[str, float]
  learning_rate: float
  identity: str = ""

  def __post_init__(self):
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
      raise ValueError(
          f"arm name={self.name!r} becomes a directory: use letters, digits, "
          "'.', '_' and '-', beginning with a letter or digit")
    for key in ("total_params", "active_params", "flops_per_token"):
      if key not in self.quantities:
        raise ValueError(f"arm {self.name!r} lacks quantities[{key!r}]")


@dataclasses.dataclass(frozen=True)
class Held:
  """A quantity that was, or could not be, held equal.

  deviation: the largest relative deviation from target over `arms` (every arm
    when empty); 0.005 is half a percent. note: a reason, for what was not held.
  """
  quantity: str
  target: float
  deviation: float
  note: str = ""
  arms: tuple[str, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "arms", tuple(self.arms))


@dataclasses.dataclass(frozen=True)
class Ablation:
  """The plan: everything that is known before the first step.

  question: one sentence. budget: its name ("minute", "laptop", "gpu").
  train: steps, batch_size, seq_len, tokens (of one run) are required; more
    entries are shown as they are. learning_rate_rule, data, command: text.
  trend: a law to fit, if any.
  versions: python, jax, flax, optax, commit, ... hardware: device, cores, ...
  """
  name: str
  question: str
  budget: str
  seeds: tuple[int, ...]
  baseline: str
  arms: tuple[Arm, ...]
  held_equal: tuple[Held, ...]
  not_held: tuple[Held, ...]
  learning_rate_rule: str
  data: str
  train: dict[str, float | str]
  claims: tuple[Claim, ...]
  versions: dict[str, str]
  hardware: dict[str, str | int]
  command: str
  trend: Trend | None = None

  def __post_init__(self):
    for field in ("seeds", "arms", "held_equal", "not_held", "claims"):
      object.__setattr__(self, field, tuple(getattr(self, field)))
    names = [arm.name for arm in self.arms]
    for what, values in (("arms", names), ("seeds", self.seeds)):
      if not values or len(set(values)) != len(values):
        raise ValueError(
            f"{what}={list(values)}: name at least one, and none twice")
    if self.baseline not in names:
      raise ValueError(f"baseline={self.baseline!r} is not one of {names}")
    for item in (*self.claims, *self.held_equal, *self.not_held):
      if unknown := set(item.arms) - set(names):
        raise ValueError(
            f"{type(item).__name__} names arms {sorted(unknown)}, "
            f"which are not among {names}: {item}")
    for key in ("steps", "batch_size", "seq_len", "tokens"):
      if key not in self.train:
        raise ValueError(f"train lacks {key!r}; it has {list(self.train)}")

  def arm(self, name: str) -> Arm:
    return next(arm for arm in self.arms if arm.name == name)


@dataclasses.dataclass(frozen=True)
class Router:
  """Router statistics at the end of a run, one entry for each MoE layer.

  load: [layers][experts], the share of the routed tokens that each expert got;
  max_vio, entropy (nats): [layers]; dropped: share of the routed tokens.
  """
  load: list[list[float]]
  max_vio: list[float]
  entropy: list[float]
  dropped: float


@dataclasses.dataclass(frozen=True)
class Run:
  """How one arm ended with one seed.

  tokens_per_second: median over the training steps, compilation excluded.
  measured: further numbers, by the name of their metric; series: points (x, y)
    by what they show (`experiments.measurements`).
  failure: why the run has no result ("loss is nan at step 120"); the other
    fields are then None. A failed run is reported and not compared.
  """
  eval_loss: float | None = None
  bits_per_byte: float | None = None
  tokens_per_second: float | None = None
  router: Router | None = None
  measured: dict[str, float] = dataclasses.field(default_factory=dict)
  series: dict[str, list[list[float]]] = dataclasses.field(
      default_factory=dict)
  failure: str = ""

  def __post_init__(self):
    if isinstance(self.router, dict):
      object.__setattr__(self, "router", Router(**self.router))
    if self.failure:
      return
    for name in ("eval_loss", "bits_per_byte", "tokens_per_second"):
      value = getattr(self, name)
      if value is None or not math.isfinite(value):
        raise ValueError(
            f"{name}={value} of a finished run must be a finite number; for a "
            "run that diverged write failure='...' instead")

  def value(self, metric: str) -> float | None:
    """What was measured of a metric; MaxVio is the mean of the MoE layers."""
    if metric == "max_vio":
      return self.router and (
          sum(self.router.max_vio) / len(self.router.max_vio))
    return self.measured.get(metric, getattr(self, metric, None))


@dataclasses.dataclass(frozen=True)
class Speed:
  """What an arm costs. None (or an empty list) is what was not measured.

  *_tokens_per_second: repeated measurements (one stream for decode).
  peak_memory_bytes: of a training step, as the compiler counts it, so that it
    is the same every time; so is kv_bytes_per_token.
  """
  prefill_tokens_per_second: list[float] = dataclasses.field(
      default_factory=list)
  decode_tokens_per_second: list[float] = dataclasses.field(
      default_factory=list)
  peak_memory_bytes: int | None = None
  kv_bytes_per_token: float | None = None


@dataclasses.dataclass(frozen=True)
class Results:
  """All that is on disk. runs and curves: [arm][seed]; speeds: [arm]."""
  ablation: Ablation
  runs: dict[str, dict[int, Run]]
  curves: dict[str, dict[int, list[dict]]]
  speeds: dict[str, Speed]


def ablation_path(workdir) -> pathlib.Path:
  return pathlib.Path(workdir) / "ablation.json"


def run_dir(workdir, arm: str, seed: int) -> pathlib.Path:
  return pathlib.Path(workdir) / "arms" / arm / f"seed_{seed}"


def metrics_path(workdir, arm: str, seed: int) -> pathlib.Path:
  return run_dir(workdir, arm, seed) / "metrics.jsonl"


def run_path(workdir, arm: str, seed: int) -> pathlib.Path:
  return run_dir(workdir, arm, seed) / "result.json"


def speed_path(workdir, arm: str) -> pathlib.Path:
  return pathlib.Path(workdir) / "arms" / arm / "speed.json"


def write_bytes(path, content: bytes) -> None:
  """Writes a file that appears whole or not at all."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
  try:
    with os.fdopen(handle, "wb") as f:
      f.write(content)
      f.flush()
      os.fsync(f.fileno())
    os.chmod(partial, 0o644)  # mkstemp's file is its owner's alone
    os.replace(partial, path)
  except BaseException:
    os.unlink(partial)
    raise


def write(path, value: Ablation | Run | Speed) -> None:
  """Writes one of the JSON files, at the path that *_path gives."""
  text = json.dumps(dataclasses.asdict(value), indent=2, allow_nan=False)
  write_bytes(path, f"{text}\n".encode())


def read_ablation(workdir) -> Ablation:
  path = ablation_path(workdir)
  if not path.is_file():
    raise ValueError(
        f"{workdir} is no ablation: it has no ablation.json; give the "
        "directory that was the runner's --workdir")
  return _read(path, as_ablation)


def as_ablation(*, arms, held_equal, not_held, claims, trend=None,
                **fields) -> Ablation:
  """From what `dataclasses.asdict` made of one."""
  return Ablation(
      arms=[Arm(**arm) for arm in arms],
      held_equal=[Held(**held) for held in held_equal],
      not_held=[Held(**held) for held in not_held],
      claims=[Claim(**claim) for claim in claims],
      trend=trend and Trend(**trend), **fields)


def read_run(workdir, arm: str, seed: int) -> Run | None:
  """None when the run has not ended."""
  path = run_path(workdir, arm, seed)
  return _read(path, Run) if path.is_file() else None


def read_speed(workdir, arm: str) -> Speed | None:
  path = speed_path(workdir, arm)
  return _read(path, Speed) if path.is_file() else None


def read_metrics(path) -> list[dict]:
  """Lines by step; of a step logged twice (a resumed run) the later one."""
  path = pathlib.Path(path)
  if not path.is_file():
    return []
  steps = {}
  lines = path.read_text(encoding="utf-8").splitlines()
  for number, line in enumerate(lines, 1):
    try:
      entry = json.loads(line)
      steps[entry["step"]] = entry
    except (ValueError, KeyError, TypeError) as error:
      if number == len(lines):
        break  # a killed run leaves a last line half-written
      raise ValueError(
          f"{path}, line {number} is no line of metrics: {error}; "
          "delete the file and run again") from error
  return [steps[step] for step in sorted(steps)]


def read_results(workdir) -> Results:
  """Reads an ablation as far as it has come."""
  ablation = read_ablation(workdir)
  runs, curves, speeds = {}, {}, {}
  for arm in ablation.arms:
    found = {seed: read_run(workdir, arm.name, seed) for seed in ablation.seeds}
    runs[arm.name] = {seed: run for seed, run in found.items() if run}
    curves[arm.name] = {
        seed: read_metrics(metrics_path(workdir, arm.name, seed))
        for seed in ablation.seeds}
    speeds[arm.name] = read_speed(workdir, arm.name) or Speed()
  return Results(ablation, runs, curves, speeds)


def _read(path, build):
  try:
    return build(**json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError) as error:
    raise ValueError(
        f"{path} is damaged or was written by another version: {error}; "
        "delete it and run again") from error
