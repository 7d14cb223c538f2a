"""Runs an experiment, or goes on with one that was stopped:

  python -m experiments.main --config experiments/configs/NAME.py[:BUDGET]
      [--workdir DIR] [--config.train.steps=300 ...]

Exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by Ctrl-C or
SIGTERM.
"""
import ast
import pathlib
import runpy
import shlex
import signal
import sys

from absl import flags
import jax
from ml_collections import config_flags

from experiments import runner
from experiments.measured import CONFIGS
from jaxlm.train.memory import keep_freed_memory


class UsageError(Exception):
  """The command line makes no sense."""


def main(argv: list[str] | None = None) -> int:
  argv = list(sys.argv if argv is None else argv)
  command = f"python -m experiments.main {shlex.join(argv[1:])}"
  handler = signal.signal(signal.SIGTERM, _terminate)
  try:
    keep_freed_memory()
    return _run(argv, command)
  except UsageError as error:
    print(f"error: {error}\n\n{usage()}", file=sys.stderr)
    return 2
  except KeyboardInterrupt as error:
    print(f"{error or 'stopped'}. The same command continues:\n  {command}",
          file=sys.stderr)
    return getattr(error, "exit_status", 130)
  except (ValueError, OSError, NotImplementedError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  finally:
    signal.signal(signal.SIGTERM, handler)


class _Terminated(KeyboardInterrupt):
  exit_status = 128 + signal.SIGTERM


def _terminate(number, frame):
  raise _Terminated("stopped by SIGTERM")


def usage() -> str:
  lines = [__doc__.split("\n\n")[1], "", "configs and their budgets:"]
  for path in sorted(CONFIGS.glob("*.py")):
    budgets = runpy.run_path(str(path)).get("BUDGETS", {})
    lines.append(f"  experiments/configs/{path.name}: {', '.join(budgets)}")
  return "\n".join(lines)


def _run(argv, command) -> int:
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  flags.DEFINE_bool("help", False, "", flag_values=values)
  _parse(values, argv)
  if values.help:
    print(usage())
    return 0
  if not values["config"].present:
    raise UsageError("--config is missing")
  path, budget = _split(values["config"].config_filename)
  config, experiment = values.config, runpy.run_path(str(path))
  if "get_design" not in experiment:
    raise ValueError(f"{path} has no get_design(config): see experiments/"
                     "design.py for what a config file needs")
  defaults = experiment["get_config"](*budget)
  check_tuples(config, defaults)
  workdir = pathlib.Path(
      values.workdir or pathlib.Path("runs") / f"{path.stem}-{config.budget}")
  # Quick to read back, and a restart is spared the compilation.
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  for report in runner.run(path.stem, config,
                           experiment["get_design"](config), workdir,
                           command=command):
    print(report)
  return 0


def _parse(values, argv) -> None:
  try:
    rest = values(argv)
  except flags.UnrecognizedFlagError as error:
    raise UsageError(error) from error
  except (AttributeError, KeyError) as error:
    raise ValueError(f"--config has no entry {_plain(error)}") from error
  except (flags.Error, TypeError) as error:
    # The last line, where a whole traceback is the message.
    raise ValueError(_plain(error).splitlines()[-1]) from error
  if rest[1:]:
    raise UsageError(f"{' '.join(rest[1:])!r} is no option")


def _plain(error) -> str:
  """The message; ml_collections passes on the repr of a KeyError's."""
  text = str(error).strip()
  while text[:1] in "'\"" and text[-1:] == text[:1] != "":
    text = ast.literal_eval(text)
  return text.replace("'\nDid", "'. Did")


def _split(config_flag: str) -> tuple[pathlib.Path, tuple[str, ...]]:
  """NAME.py:BUDGET to the path and the arguments of get_config."""
  stem, dot_py, budget = config_flag.partition(".py")
  path = pathlib.Path(stem + dot_py)
  if not path.is_file():
    raise ValueError(f"--config {path}: there is no such file; give "
                     "experiments/configs/NAME.py:BUDGET")
  return path, (budget[1:],) if budget.startswith(":") else ()


def check_tuples(config, defaults, path: str = "config") -> None:
  """Refuses what flags let pass: the wrong type inside a tuple."""
  for name, default in defaults.items():
    value, where = config[name], f"{path}.{name}"
    if isinstance(default, type(defaults)):
      check_tuples(value, default, where)
    elif isinstance(default, tuple):
      wanted = type(default[0])
      accepted = (int, float) if wanted is float else wanted
      wrong = [item for item in value if not isinstance(item, accepted)]
      if wrong or not value:
        raise ValueError(f"{where}={value}: expected {wanted.__name__}s, such "
                         f"as {default}")


if __name__ == "__main__":
  sys.exit(main())
