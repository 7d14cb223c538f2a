"""The suite's report, made from what is kept in experiments/measured/ alone."""
from collections.abc import Mapping
import pathlib

from experiments import measured
from experiments import plots
from experiments import report
from experiments import results as results_lib
from experiments import verdicts

DIRECTORY = pathlib.Path(__file__).parent
BUDGETS = ("gpu", "laptop", "minute")
# Of the plots of an ablation, those that stand in the suite's report.
SHOWN = ("differences", "trend", "series")


def write(configs: Mapping[str, pathlib.Path], directory=DIRECTORY
          ) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes RESULTS.html (which stands alone) and RESULTS.md, with its pictures
  in figures/; returns their paths. The same files give the same report.

  Args:
    configs: the config files by name, in the order of the report.
    directory: which has measured/, and gets the report.

  Raises:
    ValueError: nothing is kept yet, or a file is damaged.
  """
  directory = pathlib.Path(directory)
  found = [_section(path, configs[name]) for name, path in
           _kept(configs, directory / "measured")]
  if not found:
    raise ValueError(f"{directory / 'measured'} holds no results: run "
                     "python -m experiments.suite first")
  for section in found:
    for plot in section["plots"][:1]:  # in Markdown the first is enough
      results_lib.write_bytes(directory / "figures" / f"{section['name']}.png",
                              plots.png(plot["figure"]))
  measured_names = {section["ablation"].name for section in found}
  verdict_words = (verdicts.AGREES, verdicts.DISAGREES, verdicts.CANNOT_TELL)
  paths = []
  for suffix in ("html", "md"):
    template = report.environment().get_template(f"suite.{suffix}")
    paths.append(directory / f"RESULTS.{suffix}")
    text = template.render(
        sections=found, verdict_words=verdict_words,
        missing=[name for name in configs if name not in measured_names])
    results_lib.write_bytes(paths[-1], text.encode())
  return tuple(paths)


def _kept(configs, directory):
  """(experiment, file) of the best budget measured, in order."""
  for name in configs:
    for budget in BUDGETS:
      path = measured.path_of(name, budget, directory)
      if path.is_file():
        yield name, path
        break


def _section(path, config) -> dict:
  """What the templates say of one ablation."""
  results = measured.read(path)
  content = report.describe(results)
  drawn = [
      {"figure": figure, "caption": caption,
       "svg": plots.svg(figure, f"{results.ablation.name}-{name}")}
      for name, caption, figure in plots.plots(results, content["analysis"])
      if name.startswith(SHOWN)]
  return {**content, "name": f"{results.ablation.name}-{results.ablation.budget}",
          "plots": drawn, "stale": measured.stale_arms(results, config),
          "counts": _counts(content["analysis"])}


def _counts(analysis) -> dict[str, int]:
  words = [verdict.verdict for verdict in analysis.verdicts]
  return {word: words.count(word) for word in words}
