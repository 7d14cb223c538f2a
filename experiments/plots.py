"""The report's plots: figures, and their SVG and PNG."""

import io
import math
import re

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from experiments import verdicts
from experiments.claims import METRICS
from experiments.wording import number, signed, size

INK, FAINT, LINE, PAGE = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
# Okabe and Ito's palette, told apart by colour-blind eyes; the baseline is ink.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":")
WIDTH = 5.0  # inches: text stays readable when a phone shows it at 360 px
STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
    "xtick.labelsize": 8.5, "ytick.labelsize": 9, "legend.fontsize": 9,
    "text.color": INK, "axes.edgecolor": LINE, "axes.labelcolor": FAINT,
    "xtick.color": FAINT, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": LINE,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "xtick.major.size": 0,
    "ytick.major.size": 0, "svg.fonttype": "none", "svg.hashsalt": "jaxlm",
}


def plots(results, analysis) -> list[tuple[str, str, Figure]]:
  """(name, caption, figure), in the report's order; what has no data is out."""
  with matplotlib.rc_context(STYLE):
    made = (
        forest(results, analysis), curves(results, analysis),
        speeds(results, analysis), memory(results, analysis),
        trend(results, analysis), *series(results, analysis),
        router_load(results, analysis))
  return [plot for plot in made if plot]


def svg(figure: Figure, name: str) -> str:
  """An <svg> element to stand inside a page: CSS colours, ids of its own."""
  buffer = io.StringIO()
  with matplotlib.rc_context(STYLE):
    figure.savefig(
        buffer, format="svg", transparent=True,
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
  text = buffer.getvalue()
  text = text[text.index("<svg"):]
  text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
  text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
  for variable, colour in [
      ("ink", INK), ("faint", FAINT), ("line", LINE), ("page", PAGE),
      *((f"arm{i}", colour) for i, colour in enumerate(PALETTE))]:
    text = text.replace(colour, f"var(--{variable})")
  return text


def png(figure: Figure) -> bytes:
  buffer = io.BytesIO()
  with matplotlib.rc_context(STYLE):
    figure.savefig(buffer, format="png", dpi=150, facecolor=PAGE)
  return buffer.getvalue()


def style_of(ablation, arm: str) -> dict:
  """Colour and dashes of an arm, the same in every plot."""
  if arm == ablation.baseline:
    return {"color": INK, "linestyle": "-"}
  names = [a.name for a in ablation.arms if a.name != ablation.baseline]
  turn, place = divmod(names.index(arm), len(PALETTE))
  return {"color": PALETTE[place], "linestyle": DASHES[turn % len(DASHES)]}


def forest(results, analysis):
  rows = [
      (arm, comparison.difference)
      for arm, comparison in analysis.against_baseline.items()
      if comparison.difference]
  if not rows:
    return None
  figure = Figure((WIDTH, 0.7 + 0.3 * len(rows)), layout="constrained")
  axes = figure.add_subplot()
  axes.axvline(0, color=INK, linewidth=1)
  for place, (arm, difference) in enumerate(rows):
    colour = style_of(results.ablation, arm)["color"]
    if difference.low is not None:
      axes.plot([difference.low, difference.high], [place] * 2, color=colour,
                linewidth=2.2, solid_capstyle="round")
    axes.plot(difference.mean, place, "o", markersize=7, color=colour,
              markerfacecolor=colour if difference.direction else PAGE)
  axes.set_yticks(range(len(rows)), [arm for arm, _ in rows])
  axes.set_ylim(len(rows) - 0.4, -0.6)
  axes.grid(visible=False, axis="y")
  axes.spines["left"].set_visible(False)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter(lambda value, _: signed(value, "g"))
  axes.set_xlabel(
      f"held-out loss minus that of {results.ablation.baseline}, nats/token")
  percent = 100 * (1 - 0.05 / max(analysis.family, 1))
  with_interval = any(d.low is not None for _, d in rows)
  return "differences", (
      "Difference in held-out loss to the baseline; left of zero is better. "
      + (f"Bars are the corrected ({percent:.4g} %) intervals; a filled dot "
         "marks one that excludes zero." if with_interval
         else "Without several seeds there are no intervals.")), figure


def curves(results, analysis):
  """Mean and range over the shared seeds, and the difference to the baseline.

  Held-out loss where it was evaluated at least three times, else the training
  loss; the steep first tenth of the run is left out.
  """
  for key, label in (("eval_loss", "held-out"), ("loss", "training")):
    found = {
        arm: curve for arm in results.curves
        if (curve := _curve(results.curves[arm], analysis.seeds, key))}
    if found and all(len(curve[0]) >= 3 for curve in found.values()):
      break
  else:
    return None
  ablation = results.ablation
  legend = math.ceil(len(found) / 3)
  figure = Figure((WIDTH, 4.3 + 0.2 * legend), layout="constrained")
  top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
  base = found.get(ablation.baseline)
  for arm, (tokens, losses) in found.items():
    style = style_of(ablation, arm)
    top.plot(tokens, losses.mean(0), label=arm, linewidth=1.6, **style)
    top.fill_between(tokens, losses.min(0), losses.max(0), alpha=0.15,
                     color=style["color"], linewidth=0)
    if base and np.array_equal(tokens, base[0]):
      apart = losses - base[1]
      bottom.plot(tokens, apart.mean(0), linewidth=1.6, **style)
      bottom.fill_between(tokens, apart.min(0), apart.max(0), alpha=0.15,
                          color=style["color"], linewidth=0)
  top.set_ylabel(f"{label} loss")
  bottom.set_ylabel("minus baseline")
  bottom.yaxis.set_major_formatter(lambda value, _: signed(value, "g"))
  bottom.set_xlabel("tokens seen")
  bottom.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
  figure.legend(loc="outside lower center", ncols=3, frameon=False)
  count = len(analysis.seeds)
  return "curves", (
      f"{label.capitalize()} loss in nats/token after the first tenth of the "
      "run" + (f": mean of {count} seeds, shaded from the lowest to the "
               "highest. Below" if count > 1 else ". Below")
      + ": minus the baseline, seed by seed."), figure


def speeds(results, analysis):
  return _bars(results, analysis, "speeds", (
      ("tokens_per_second", "training"),
      ("prefill_tokens_per_second", "prefill"),
      ("decode_tokens_per_second", "decode")), number,
      "Tokens a second (decode: one stream); more is better.")


def memory(results, analysis):
  return _bars(results, analysis, "memory", (
      ("peak_memory_bytes", "peak of a training step"),
      ("kv_bytes_per_token", "KV cache a token")), size,
      "Memory; less is better.")


def trend(results, analysis):
  """The losses of the arms that a law is fitted to, and the law."""
  law, found = results.ablation.trend, analysis.fit
  if not found:
    return None
  figure = Figure((WIDTH, 2.4), layout="constrained")
  axes = figure.add_subplot()
  axes.plot(*zip(*found.curve), color=FAINT, linewidth=1.2)
  for arm, loss in found.points.items():
    axes.plot(law.sizes[arm], loss, "o", markersize=7,
              color=style_of(results.ablation, arm)["color"])
    axes.annotate(arm, (law.sizes[arm], loss), (5, 5),
                  textcoords="offset points", color=FAINT)
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
  axes.margins(x=0.12, y=0.2)
  axes.set_xlabel(law.label)
  axes.set_ylabel("held-out loss")
  return "trend", (
      f"Held-out loss over {law.label}, and the law fitted to it: floor + gain "
      f"\u00d7 {law.label}^\u2212{found.exponent:.2g}."), figure


def series(results, analysis):
  """Of each further measurement that is a curve: its mean over the seeds."""
  names = dict.fromkeys(
      name for runs in results.runs.values() for run in runs.values()
      for name in run.series)
  return [_series(results, analysis, name, f"series{i}")
          for i, name in enumerate(names)]


def _series(results, analysis, name, key):
  found = {}
  for arm, runs in results.runs.items():
    points = [runs[seed].series[name] for seed in analysis.seeds
              if seed in runs and name in runs[seed].series]
    if points:
      found[arm] = np.array(points).mean(0)
  if not found:
    return None
  legend = math.ceil(len(found) / 3)
  figure = Figure((WIDTH, 2.4 + 0.2 * legend), layout="constrained")
  axes = figure.add_subplot()
  for arm, points in found.items():
    axes.plot(*points.T, label=arm, linewidth=1.6,
              **style_of(results.ablation, arm))
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
  axes.set_xlabel("position in the sequence")
  axes.set_ylabel("nats/token")
  figure.legend(loc="outside lower center", ncols=3, frameon=False)
  return key, f"{name.capitalize()}: mean of the seeds.", figure


def router_load(results, analysis):
  """Load by layer and rank: experts have no order to average seeds in."""
  loads = {}
  for arm, runs in results.runs.items():
    routers = [
        runs[seed].router for seed in analysis.seeds
        if seed in runs and runs[seed].router]
    if routers:
      shares = np.array([router.load for router in routers])
      shares = -np.sort(-shares, axis=2).mean(0) * shares.shape[2]
      loads[arm] = shares
  if not loads:
    return None
  columns = 2 if len(loads) > 1 else 1
  rows = math.ceil(len(loads) / columns)
  figure = Figure((WIDTH, 0.9 + 1.1 * rows), layout="constrained")
  grid = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes in grid:
    axes.set_axis_off()
  high = max(2.0, max(load.max() for load in loads.values()))
  for axes, (arm, load) in zip(grid, loads.items()):
    axes.set_axis_on()
    axes.grid(visible=False)
    image = axes.imshow(load, aspect="auto", cmap="cividis", vmin=0, vmax=high,
                        interpolation="nearest")
    axes.set_title(arm, loc="left", color=INK)
    axes.set_xticks([])
    axes.set_yticks(
        [0, len(load) - 1] if len(load) > 1 else [0],
        [f"layer {i}" for i in ([0, len(load) - 1] if len(load) > 1 else [0])])
    axes.spines[:].set_visible(False)
  figure.get_layout_engine().set(hspace=0.08, wspace=0.04)
  bar = figure.colorbar(image, ax=list(figure.axes), orientation="horizontal",
                        aspect=50, pad=0.02)
  bar.set_label("load relative to an even share")
  bar.outline.set_visible(False)
  return "load", (
      "Router load: one row an MoE layer, its experts from the most to the "
      "least loaded; 1 is an even share."), figure


def _curve(by_seed, seeds, key):
  """(tokens [points], losses [seeds, points]) at the steps of all seeds."""
  lines = [
      {line["step"]: line for line in by_seed.get(seed, ())
       if line.get(key) is not None} for seed in seeds]
  steps = sorted(set.intersection(*map(set, lines))) if lines else []
  if not steps:
    return None
  tokens = np.array([lines[0][step]["tokens"] for step in steps], np.float64)
  losses = np.array([[line[step][key] for step in steps] for line in lines])
  late = tokens >= tokens[-1] / 10
  return tokens[late], losses[:, late]


def _bars(results, analysis, name, metrics, form, caption):
  arms = list(results.runs)
  panels = []
  for metric, title in metrics:
    sides = [
        verdicts.values(results, arm, metric, analysis.seeds) for arm in arms]
    if any(sides):
      panels.append((title, [
          float(np.median(side) if METRICS[metric].source == "repeats"
                else np.mean(side)) if side else math.nan for side in sides]))
  if not panels:
    return None
  figure = Figure((WIDTH, 0.4 + 0.28 * len(arms)), layout="constrained")
  grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  colours = [style_of(results.ablation, arm)["color"] for arm in arms]
  for axes, (title, heights) in zip(grid, panels):
    axes.barh(range(len(arms)), heights, color=colours, height=0.62)
    for place, height in enumerate(heights):
      known = math.isfinite(height)
      axes.annotate(
          form(height) if known else "not measured",
          (height if known else 0, place), (3, 0), va="center",
          textcoords="offset points", color=INK if known else FAINT)
    axes.set_xlim(0, np.nanmax(heights) * 1.6)
    axes.set_title(title, loc="left", color=FAINT)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[["bottom", "left"]].set_visible(False)
  grid[0].set_yticks(range(len(arms)), arms)
  grid[0].set_ylim(len(arms) - 0.4, -0.6)
  return name, caption, figure
