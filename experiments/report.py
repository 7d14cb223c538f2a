"""The report of an ablation, made from its files alone.

  python -m experiments.report WORKDIR

writes WORKDIR/report.html (self-contained), WORKDIR/report.md with its plots
in WORKDIR/plots/, and prints the main table.
"""

import argparse
import pathlib
import sys

import jinja2
import rich.box
import rich.console
import rich.table
import rich.text

from experiments import plots
from experiments import results as results_lib
from experiments import statistics
from experiments import verdicts
from experiments import wording
from experiments.claims import METRICS
from experiments.wording import number, signed, size

MISSING = "\u2013"
COLUMNS = (  # heading, key of a row
    ("parameters", "total"), ("active", "active"), ("held-out loss", "loss"),
    ("difference to the baseline", "difference"),
    ("smallest effect", "smallest"), ("bits/byte", "bits"),
    ("training tokens/s", "training"), ("prefill tokens/s", "prefill"),
    ("decode tokens/s", "decode"), ("peak memory", "memory"),
    ("KV bytes/token", "kv"))

TERMINAL_COLUMNS = (
    ("held-out loss", "loss"), ("against baseline", "difference"),
    ("train\ntok/s", "training"), ("decode\ntok/s", "decode"),
    ("memory", "memory"))


def write_report(workdir) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes report.html and report.md into workdir; returns their paths.

  The same files give the same report, byte for byte.

  Raises:
    ValueError: workdir is no ablation, or one of its files is damaged.
  """
  workdir = pathlib.Path(workdir)
  results = results_lib.read_results(workdir)
  content = describe(results)
  figures = plots.plots(results, content["analysis"])
  (workdir / "plots").mkdir(exist_ok=True)
  for name, _, figure in figures:
    results_lib.write_bytes(
        workdir / "plots" / f"{name}.png", plots.png(figure))
  paths = []
  for suffix in ("html", "md"):
    path = workdir / f"report.{suffix}"
    template = environment().get_template(f"report.{suffix}")
    drawn = [
        {"name": name, "caption": caption,
         "svg": plots.svg(figure, name) if suffix == "html" else ""}
        for name, caption, figure in figures]
    text = template.render(**content, plots={p["name"]: p for p in drawn})
    results_lib.write_bytes(path, text.encode())
    paths.append(path)
  return tuple(paths)


def print_table(workdir, console: rich.console.Console | None = None) -> None:
  """Prints the answer, the main table and the verdicts to the terminal."""
  console = console or rich.console.Console()
  content = describe(results_lib.read_results(workdir))
  table = rich.table.Table(
      title=rich.text.Text(content["ablation"].question), title_justify="left",
      box=rich.box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("arm", overflow="fold")
  for heading, key in TERMINAL_COLUMNS:
    table.add_column(
        heading, justify="right", no_wrap=key != "difference")
  for row in content["rows"]:
    table.add_row(
        row["arm"].name, *(row[key] for _, key in TERMINAL_COLUMNS),
        style="bold" if row["is_baseline"] else "")
  for warning in content["analysis"].warnings:
    console.print(f"INCOMPLETE: {warning}", style="bold red", markup=False)
  console.print(table)
  console.print(content["answer"], style="bold", markup=False)
  console.print(content["side_answer"], markup=False)
  for verdict in content["analysis"].verdicts:
    console.print(f"{verdict.verdict}: {verdict.claim.text}", markup=False)


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
      prog="python -m experiments.report", description=(
          "Writes the report of an ablation again, from its files alone."))
  parser.add_argument("workdir", help="the directory the runner wrote to")
  workdir = parser.parse_args(arguments).workdir
  try:
    paths = write_report(workdir)
    print_table(workdir)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  for path in paths:
    print(path)
  return 0


def describe(results) -> dict:
  """The variables of the templates: all that a report says of an ablation."""
  analysis = verdicts.analyse(results)
  ablation = results.ablation
  family = max(analysis.family, 1)
  return {
      "ablation": ablation, "analysis": analysis,
      "answer": wording.answer(results, analysis),
      "side_answer": wording.side_answer(results, analysis),
      "trend": wording.trend(results, analysis),
      "measured": _measured(results, analysis),
      "columns": COLUMNS,
      "rows": [_row(results, analysis, arm) for arm in ablation.arms],
      "quantities": list(dict.fromkeys(
          key for arm in ablation.arms for key in arm.quantities)),
      "routers": _routers(results, analysis),
      "methods": wording.methods(results, analysis),
      "confidence": f"{100 * (1 - (1 - statistics.CONFIDENCE) / family):.4g}",
      "family": family, "MISSING": MISSING}


def _row(results, analysis, arm):
  def shown(metric, form):
    value = wording.typical(results, arm.name, metric, analysis.seeds)
    return MISSING if value is None else form(value)
  losses = verdicts.values(
      results, arm.name, verdicts.PRIMARY, analysis.seeds)
  loss = MISSING
  if losses:
    mean, half = statistics.mean_interval(losses)
    loss = f"{mean:.4f}" + (f" \u00b1 {half:.4f}" if half is not None else "")
  comparison = analysis.against_baseline.get(arm.name)
  is_baseline = arm.name == results.ablation.baseline
  difference, direction = "baseline" if is_baseline else MISSING, 0
  if comparison and (found := comparison.difference):
    difference = signed(found.mean, "+.4f") + (
        f" {wording.interval(found.low, found.high)}"
        if found.low is not None else "")
    direction = found.direction
  return {
      "arm": arm, "is_baseline": is_baseline,
      "total": number(arm.quantities["total_params"]),
      "active": number(arm.quantities["active_params"]),
      "loss": loss, "difference": difference, "direction": direction,
      "smallest": (comparison and wording.smallest_effect(comparison).removesuffix(
          " nats/token")) or MISSING,
      "bits": shown("bits_per_byte", "{:.4f}".format),
      "training": shown("tokens_per_second", number),
      "prefill": shown("prefill_tokens_per_second", number),
      "decode": shown("decode_tokens_per_second", number),
      "memory": shown("peak_memory_bytes", size),
      "kv": shown("kv_bytes_per_token", "{:,.0f}".format)}


def _routers(results, analysis):
  """Means over the seeds, for arms with a router."""
  rows = []
  for arm, runs in results.runs.items():
    routers = [
        runs[seed].router for seed in analysis.seeds
        if seed in runs and runs[seed].router]
    if not routers:
      continue
    def mean(values):
      values = list(values)
      return sum(values) / len(values)
    rows.append({
        "arm": arm,
        "max_vio": f"{mean(mean(r.max_vio) for r in routers):.3f}",
        "worst": f"{mean(max(r.max_vio) for r in routers):.3f}",
        "entropy": f"{mean(mean(r.entropy) for r in routers):.3f}",
        "dropped": f"{100 * mean(r.dropped for r in routers):.2f} %"})
  return rows


def _measured(results, analysis):
  """(headings, rows): means and 95 % intervals of what else was measured, and
  of MaxVio if claims are about it."""
  names = list(dict.fromkeys(
      name for runs in results.runs.values() for run in runs.values()
      for name in run.measured))
  if any(claim.metric == "max_vio" for claim in results.ablation.claims):
    names.insert(0, "max_vio")
  def shown(arm, name):
    found = verdicts.values(results, arm, name, analysis.seeds)
    if not found:
      return MISSING
    mean, half = statistics.mean_interval(found)
    return f"{mean:.4f}" + (f" \u00b1 {half:.4f}" if half is not None else "")
  return [METRICS[name].label for name in names], [
      (arm, [shown(arm, name) for name in names]) for arm in results.runs
      if names]


def environment() -> jinja2.Environment:
  """With the filters of all reports' templates."""
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(
          pathlib.Path(__file__).parent / "templates"),
      autoescape=lambda name: name.endswith(".html"),
      undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
      keep_trailing_newline=True)
  environment.filters.update(
      finding=wording.finding, percent=wording.percent, quantity=_quantity,
      cell=_cell)
  return environment


def _cell(text):
  """Plain text for Markdown: one line, no table column, no HTML."""
  return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _quantity(value):
  return f"{value:,}" if isinstance(value, (int, float)) else str(value)


if __name__ == "__main__":
  sys.exit(main())
