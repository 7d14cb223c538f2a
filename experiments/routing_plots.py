"""The figures of a page about routing."""
import math

import matplotlib
from matplotlib import colors, ticker
from matplotlib.figure import Figure
import numpy as np

from experiments.plots import FAINT, INK, PALETTE, STYLE, WIDTH
from experiments.routing_text import colours

# Less than even, even (whatever the page's colour is), more.
DIVERGING = colors.LinearSegmentedColormap.from_list("diverging", [
    colors.to_rgba(PALETTE[0]), (0.5, 0.5, 0.5, 0.0),
    colors.to_rgba(PALETTE[1])])
FEWEST = 5  # pairs expected, below which a ratio is noise


def load(load_LE, layer_names) -> Figure:
  """Bars, layer by layer: load relative to an even share."""
  num_layers, num_experts = load_LE.shape
  columns = 1 if num_layers == 1 else 2
  rows = math.ceil(num_layers / columns)
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH, 0.5 + 0.75 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in list(grid.flat)[num_layers:]:
      axes.set_axis_off()
    for axes, shares, name in zip(grid.flat, load_LE, layer_names):
      axes.bar(range(num_experts), shares * num_experts, width=0.9,
               color=colours(num_experts))
      axes.axhline(1, color=INK, linewidth=0.8)
      axes.set_title(name, loc="left", color=FAINT, pad=2)
      axes.set_xticks([])
      axes.set_xlim(-0.6, num_experts - 0.4)
      axes.yaxis.set_major_locator(ticker.MaxNLocator(3, integer=True))
    return figure


def over_training(tokens, load_SLE, layer_names) -> Figure:
  """Shares of all experts, one on top of the other, layer by layer."""
  num_layers, num_experts = load_SLE.shape[1:]
  columns = 1 if num_layers == 1 else 2
  rows = math.ceil(num_layers / columns)
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH, 0.6 + 1.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True,
                           sharex=True)
    for axes in list(grid.flat)[num_layers:]:
      axes.set_axis_off()
    for layer, (axes, name) in enumerate(zip(grid.flat, layer_names)):
      axes.stackplot(tokens, load_SLE[:, layer].T, colors=colours(num_experts),
                     linewidth=0)
      axes.set_title(name, loc="left", color=FAINT, pad=2)
      axes.set_ylim(0, 1)
      axes.set_yticks([0, 0.5, 1])
      axes.margins(x=0)
      axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
      axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
    figure.supxlabel("tokens seen", color=FAINT, fontsize=9)
    return figure


def information(associations, layer_names) -> Figure:
  """What experts tell of labels by layer, and what they would by chance.

  Args:
    associations: by what the labels are, one Association for each layer.
  """
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot()
    layers = np.arange(len(layer_names))
    for i, (name, found) in enumerate(associations.items()):
      colour, side = PALETTE[i], 0.12 * (2 * i - len(associations) + 1)
      chance_S = [x.chance_S for x in found]
      axes.vlines(layers + side, np.min(chance_S, 1), np.max(chance_S, 1),
                  color=colour, linewidth=4, alpha=0.35,
                  label=f"{name}, by chance")
      axes.plot(layers + side, [x.bits for x in found], "o", color=colour,
                markersize=5, label=name)
    axes.set_ylabel("bits")
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    every = max(1, math.ceil(len(layers) / 8))
    axes.set_xticks(layers[::every], layer_names[::every])
    axes.grid(visible=False, axis="x")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2,
                  frameon=False)
    return figure


def coactivation(counts_EE, expected_EE) -> Figure:
  """How often pairs are chosen, over what independence gives."""
  num_experts = len(counts_EE)
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio_EE = np.log2(np.maximum(counts_EE, 0.5) / expected_EE)
  unknown = (expected_EE < FEWEST) | np.eye(num_experts, dtype=bool)
  with matplotlib.rc_context(STYLE):
    figure = Figure((WIDTH, WIDTH), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    image = axes.imshow(np.ma.masked_where(unknown, ratio_EE), cmap=DIVERGING,
                        vmin=-2, vmax=2, interpolation="none")
    # What has no ratio is crossed out, unlike what has an even one.
    y, x = np.nonzero(unknown)
    axes.plot(x, y, "x", color=FAINT, alpha=0.5,
              markersize=min(4, 120 / num_experts), markeredgewidth=0.6)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    step = max(1, math.ceil(num_experts / 16))
    axes.set_xticks(range(0, num_experts, step))
    axes.set_yticks(range(0, num_experts, step))
    axes.set_xlabel("expert")
    axes.set_ylabel("expert")
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=40,
                          pad=0.02, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_xticklabels(["1/4", "1/2", "as expected", "2", "4 times"])
    bar.outline.set_visible(False)
    return figure
