"""Plots of a comparison: every seed a small mark, their mean a large one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from oreo_jax.report.style import COLOURS, STYLE, panel, to_svg

_SERIES = (("blue", "o"), ("orange", "s"), ("green", "^"), ("purple", "D"))


class Runs(NamedTuple):
  """The runs of one method."""

  label: str
  accuracies: Sequence[float]  # one a seed
  colour: str  # a key of COLOURS


def methods(rows: Sequence[Runs]) -> str:
  """A row a method, best read top to bottom.

  Args:
    rows: the methods, in order.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(6.4, 0.65 + 0.31 * len(rows))
    for row, (_, accuracies, colour_name) in enumerate(rows):
      colour = COLOURS[colour_name]
      _seeds(axes, accuracies, [row] * len(accuracies), colour)
      mean = float(np.mean(accuracies))
      axes.plot(mean, row, "o", color=colour, ms=7.5)
      axes.annotate(
        f"{100 * mean:.1f}%",
        (max(accuracies), row),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        fontsize=9.5,
        fontweight="bold",
      )
    axes.set_yticks(range(len(rows)), [runs.label for runs in rows])
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    # Room for the figure beside the right-most mark.
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.12 * (high - low))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(_even_percents(8))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("problems solved; small marks: seeds, large: their mean")
    return to_svg(figure, "Accuracy of every method")


def granularities(
  runs: Mapping[str, Sequence[float]], *, start: tuple[str, Sequence[float]]
) -> str:
  """What one action is, against accuracy (the paper's figure 5).

  Args:
    runs: by granularity, the accuracy of every seed.
    start: name and accuracies of where they start.
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(4.2, 3.2)
    axes.axhline(
      float(np.mean(start[1])), color=COLOURS["grey"], ls=(0, (4, 3)), lw=1.4,
      zorder=1, label=start[0],
    )  # fmt: skip
    for place, accuracies in enumerate(runs.values()):
      _seeds(axes, [place] * len(accuracies), accuracies, COLOURS["blue"])
    means = [float(np.mean(accuracies)) for accuracies in runs.values()]
    axes.plot(
      range(len(runs)),
      means,
      "o",
      color=COLOURS["blue"],
      ms=7.5,
      label="mean over seeds",
    )
    for place, mean in enumerate(means):
      axes.annotate(
        f"{100 * mean:.1f}%",
        (place, mean),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
      )
    axes.set_xticks(range(len(runs)), list(runs))
    axes.set_xlim(-0.4, len(runs) - 0.3)
    axes.set_xlabel("one action is a ...")
    _accuracy_axis(axes)
    _legend_above(figure, axes)
    return to_svg(figure, "Accuracy by granularity")


def rounds(runs: Mapping[str, Sequence[Sequence[float]]]) -> str:
  """Accuracy after every round (the paper's figure 2).

  Args:
    runs: by method, of every seed the accuracies of rounds 0, 1, ...
  """
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(4.2, 3.2)
    for index, (name, seeds) in enumerate(runs.items()):
      colour, marker = _SERIES[index % len(_SERIES)]
      numbers = np.asarray(seeds, np.float64)
      x = np.arange(numbers.shape[1])
      if len(numbers) > 1:
        for line in numbers:
          axes.plot(x, line, color=COLOURS[colour], lw=0.9, alpha=0.35)
      axes.plot(
        x,
        numbers.mean(axis=0),
        color=COLOURS[colour],
        marker=marker,
        label=name,
      )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round (0: where they start)")
    _accuracy_axis(axes)
    _legend_above(figure, axes)
    return to_svg(figure, "Accuracy after every round")


def _seeds(
  axes: Axes, x: Sequence[float], y: Sequence[float], colour: str
) -> None:
  if len(x) > 1:
    axes.plot(x, y, "o", color=colour, ms=4.5, alpha=0.45, mew=0)


def _accuracy_axis(axes: Axes) -> None:
  axes.set_ylabel("problems solved")
  axes.yaxis.set_major_locator(_even_percents(7))
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.grid(axis="x", visible=False)


def _even_percents(most: int) -> MaxNLocator:
  """Ticks that the labels do not have to round."""
  return MaxNLocator(most, steps=[1, 2, 5, 10])


def _legend_above(figure, axes: Axes) -> None:
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside upper left", ncols=2, borderaxespad=0
  )
