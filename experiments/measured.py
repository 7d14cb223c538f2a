"""Results kept as data: `experiments/measured/NAME-BUDGET.jsonl`.

The first line is the plan of an ablation, with the command, versions and
hardware; then comes a line for each arm, with what it costs to run, and one for
each arm and seed. Reports of the suite are made from these files alone. An arm
carries the hash of all that decided its results (`plan.arm_identities`): where
a config has another one today, the arm's rows are stale.
"""
import dataclasses
import importlib.util
import json
import pathlib

from experiments import plan
from experiments import results as results_lib
from experiments.results import Results, Run, Speed

DIRECTORY = pathlib.Path(__file__).parent / "measured"
CONFIGS = pathlib.Path(__file__).parent / "configs"
DIGITS = 6


def path_of(name: str, budget: str, directory=DIRECTORY) -> pathlib.Path:
  return pathlib.Path(directory) / f"{name}-{budget}.jsonl"


def record(workdir, directory=DIRECTORY) -> pathlib.Path:
  """Writes a finished ablation's file, in place of an older one.

  Raises:
    ValueError: workdir is no ablation, or not finished.
  """
  found = results_lib.read_results(workdir)
  ablation = found.ablation
  missing = [f"{arm}, seed {seed}" for arm, runs in found.runs.items()
             for seed in ablation.seeds if seed not in runs]
  if missing:
    raise ValueError(f"{workdir} is not finished: {'; '.join(missing[:3])}"
                     f"{'; ...' if missing[3:] else ''}. Run it to its end: "
                     f"{ablation.command}")
  lines = [{"ablation": dataclasses.asdict(ablation)}]
  for arm, runs in found.runs.items():
    lines.append({"arm": arm, "speed": dataclasses.asdict(found.speeds[arm])})
    for seed, run in runs.items():
      curve = [{key: entry[key] for key in CURVE if key in entry}
               for entry in found.curves[arm][seed] if "eval_loss" in entry]
      lines.append({"arm": arm, "seed": seed, "run": dataclasses.asdict(run),
                    "curve": curve})
  path = path_of(ablation.name, ablation.budget, directory)
  results_lib.write_bytes(path, "".join(
      json.dumps(_rounded(line), allow_nan=False) + "\n"
      for line in lines).encode())
  return path


# Of an evaluated step's line of metrics.
CURVE = ("step", "tokens", "loss", "eval_loss")


def _rounded(value):
  if isinstance(value, float):
    return float(f"{value:.{DIGITS}g}")
  if isinstance(value, dict):
    return {name: _rounded(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_rounded(item) for item in value]
  return value


def read(path) -> Results:
  """Raises ValueError, naming the line, where the file is damaged."""
  ablation, runs, curves, speeds = None, {}, {}, {}
  lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  for number, line in enumerate(lines, 1):
    try:
      entry = json.loads(line)
      if "ablation" in entry:
        ablation = results_lib.as_ablation(**entry["ablation"])
        for arm in ablation.arms:
          runs[arm.name], curves[arm.name] = {}, {}
      elif "seed" in entry:
        arm, seed = entry["arm"], entry["seed"]
        runs[arm][seed] = Run(**entry["run"])
        curves[arm][seed] = entry["curve"]
      else:
        speeds[entry["arm"]] = Speed(**entry["speed"])
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path}, line {number} is damaged or of another version"
                       f" ({error}): record the ablation again") from error
  if ablation is None:
    raise ValueError(f"{path} is empty: record the ablation again")
  return Results(ablation, runs, curves, speeds)


def stale_arms(results: Results, config_path: pathlib.Path) -> list[str]:
  """Arms whose rows were measured with another config than there is today."""
  ablation = results.ablation
  module = load_config(config_path)
  config = module.get_config(ablation.budget)
  today = plan.arm_identities(config, module.get_design(config))
  return [arm.name for arm in ablation.arms
          if today.get(arm.name) != arm.identity]


def load_config(path: pathlib.Path):
  """The module of a config file."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
