"""Plots of the report: plain numbers in, an inline `<svg>` element out.

Series differ by marker or dash too, never by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from oreo_jax.report.style import COLOURS, STYLE, panel, to_svg

_SERIES = (("blue", "o"), ("orange", "s"), ("green", "^"), ("purple", "D"))


class Point(NamedTuple):
  """One measured accuracy."""

  x: float  # where it stands on the horizontal axis
  accuracy: float
  interval: Sequence[float]  # low, high


class Bar(NamedTuple):
  """One row of the accuracy plot."""

  name: str
  accuracy: float
  interval: Sequence[float]  # low, high
  colour: str  # a key of COLOURS


def accuracies(bars: Sequence[Bar]) -> str:
  """A dot and its interval a method, best read top to bottom."""
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(6.4, 0.65 + 0.31 * len(bars))
    for row, bar in enumerate(bars):
      colour = COLOURS[bar.colour]
      axes.plot(bar.interval, (row, row), color=colour, lw=2.2, alpha=0.45)
      axes.plot(bar.accuracy, row, "o", color=colour, ms=7)
      axes.annotate(
        f"{100 * bar.accuracy:.1f}%",
        (max(bar.interval[1], bar.accuracy), row),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=9.5,
        fontweight="bold",
      )
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    lowest = min(bar.interval[0] for bar in bars)
    axes.set_xlim(max(0.0, math.floor(10 * lowest - 0.5) / 10), 1.06)
    axes.xaxis.set_major_locator(FixedLocator(np.arange(0, 1.01, 0.1).tolist()))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("problems solved, with 95% interval")
    return to_svg(figure, "Accuracy of every method with 95% interval")


def budgets(
  series: Mapping[str, Sequence[Point]],
  *,
  reference: tuple[str, float] | None,
  x_label: str,
) -> str:
  """Accuracy against compute on a doubling axis, one line a search method."""
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(4.4, 3.5)
    axes.set_xscale("log", base=2)
    xs = sorted({point.x for points in series.values() for point in points})
    for index, (name, points) in enumerate(series.items()):
      colour, marker = _SERIES[index % len(_SERIES)]
      points = sorted(points)
      # Small shifts keep the intervals of several methods apart.
      shift = 2 ** (0.05 * (index - (len(series) - 1) / 2))
      x = np.array([point.x for point in points]) * shift
      y = np.array([point.accuracy for point in points])
      ends = np.array([point.interval for point in points]).T
      axes.vlines(x, *ends, color=COLOURS[colour], lw=1.4, alpha=0.5)
      axes.plot(x, y, color=COLOURS[colour], marker=marker, label=name)
    if reference is not None:
      axes.axhline(
        reference[1], color=COLOURS["grey"], ls=(0, (4, 3)), lw=1.4, zorder=1,
        label=reference[0],
      )  # fmt: skip
    ticks = _spaced(xs)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xlabel(x_label)
    axes.set_ylabel("problems solved")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x", visible=False)
    _legend_above(figure, axes, columns=2)
    return to_svg(figure, f"Accuracy of search against {x_label}")


def curve(stage: str, name: str, steps: np.ndarray, numbers: np.ndarray) -> str:
  """One metric of one stage: every row faint, a running mean over it."""
  steps, numbers = np.asarray(steps), np.asarray(numbers, np.float64)
  finite = np.isfinite(numbers)
  steps, numbers = steps[finite], numbers[finite]
  window = max(1, numbers.size // 25)
  drawn = slice(None, None, math.ceil(numbers.size / 300))
  smooth = _running_mean(numbers, window)
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(2.7, 1.9)
    if window > 1:
      axes.plot(
        steps[drawn], numbers[drawn], color=COLOURS["blue"], lw=0.9, alpha=0.35
      )
    axes.plot(steps[drawn], smooth[drawn], color=COLOURS["blue"])
    axes.set_title(name, loc="left", color=COLOURS["ink"], fontsize=9.5)
    axes.set_xlabel("step")
    # A first row that is far off would press the rest into a flat line.
    settled = numbers[numbers.size // 10 :]
    if numbers.size >= 20 and np.ptp(numbers) > 5 * np.ptp(settled) > 0:
      margin = 0.25 * np.ptp(settled)
      axes.set_ylim(settled.min() - margin, settled.max() + margin)
      axes.set_xlabel("step (its start is off the scale)")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x", visible=False)
    return to_svg(figure, f"{stage}: {name} against training step")


def value_histogram(
  title: str,
  edges: Sequence[float],
  correct: Sequence[float],
  wrong: Sequence[float],
) -> str:
  """Values of right and wrong answers, each class a distribution of its own."""
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(2.7, 2.2)
    for counts, name, colour, line in (
      (correct, "right", "blue", "-"),
      (wrong, "wrong", "orange", (0, (3, 1.5))),
    ):
      total = max(float(np.sum(counts)), 1.0)
      axes.stairs(
        np.asarray(counts, np.float64) / total,
        edges,
        fill=True,
        color=COLOURS[colour],
        alpha=0.22,
      )
      axes.stairs(
        np.asarray(counts, np.float64) / total,
        edges,
        color=COLOURS[colour],
        lw=1.6,
        ls=line,
        label=name,
      )
    axes.set_title(title, loc="left", color=COLOURS["ink"], fontsize=9.5)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("value")
    axes.set_ylabel("share of answers")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(loc="upper left", ncols=2, borderaxespad=0)
    return to_svg(figure, f"Histogram of values, {title}")


def calibration(
  predicted: Sequence[float], observed: Sequence[float], count: Sequence[int]
) -> str:
  """Mean reward against value; the area of a dot is its share of answers."""
  low = min(0.0, *predicted, *observed)
  high = max(1.0, *predicted, *observed)
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(4.2, 3.6)
    axes.plot(
      (low, high), (low, high), color=COLOURS["grey"], ls=(0, (4, 3)), lw=1.4,
      label="perfect",
    )  # fmt: skip
    axes.plot(
      predicted, observed, color=COLOURS["blue"], marker="o", lw=1.4,
      label="answers, by value",
    )  # fmt: skip
    share = np.asarray(count) / max(np.sum(count), 1)
    axes.scatter(
      predicted,
      observed,
      s=18 + 420 * share,
      color=COLOURS["blue"],
      edgecolor=COLOURS["paper"],
      zorder=3,
    )
    margin = 0.04 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel("value (predicted)")
    if min(observed, default=0.0) < 0 or max(observed, default=1.0) > 1:
      axes.set_ylim(low - margin, high + margin)
      axes.set_ylabel("mean reward (observed)")
    else:  # a mean of zeros and ones is the share that was solved
      axes.set_ylim(-0.04, 1.04)
      axes.set_ylabel("solved (observed)")
      axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_above(figure, axes, columns=2)
    return to_svg(figure, "Calibration: mean reward against value")


def auc_by_length(
  tenths: Sequence[float],
  within: Sequence[float | None],
  interval: Sequence[Sequence[float | None]],
  pooled: Sequence[float | None] | None,
) -> str:
  """AUC at every tenth of the answer, 1/2 being a coin."""
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(4.2, 3.6)
    ends = np.asarray(interval, np.float64).T
    axes.fill_between(tenths, *ends, color=COLOURS["blue"], alpha=0.18, lw=0)
    axes.plot(
      tenths,
      np.asarray(within, np.float64),
      color=COLOURS["blue"],
      marker="o",
      label="within problems",
    )
    if pooled is not None:
      axes.plot(
        tenths,
        np.asarray(pooled, np.float64),
        color=COLOURS["grey"],
        ls=(0, (4, 3)),
        lw=1.4,
        label="pooled",
      )
    axes.axhline(0.5, color=COLOURS["muted"], lw=1)
    axes.annotate(
      "coin",
      (max(tenths), 0.5),
      xytext=(0, 3),
      textcoords="offset points",
      ha="right",
      fontsize=8.5,
      color=COLOURS["muted"],
    )
    finite = ends[np.isfinite(ends)]
    axes.set_ylim(min(0.47, finite.min(initial=1.0) - 0.02), 1.01)
    _length_axis(axes)
    axes.set_ylabel("AUC, right against wrong")
    _legend_above(figure, axes, columns=2)
    return to_svg(figure, "AUC of the value at every tenth of the answer")


def means_by_length(
  tenths: Sequence[float],
  correct: Sequence[float | None],
  wrong: Sequence[float | None],
) -> str:
  """Mean value of right and wrong answers as they grow."""
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(4.2, 3.6)
    for numbers, name, colour, marker in (
      (correct, "right answers", "blue", "o"),
      (wrong, "wrong answers", "orange", "s"),
    ):
      axes.plot(
        tenths,
        np.asarray(numbers, np.float64),
        color=COLOURS[colour],
        marker=marker,
        label=name,
      )
    _length_axis(axes)
    axes.set_ylabel("mean value")
    _legend_above(figure, axes, columns=2)
    return to_svg(figure, "Mean value of right and wrong answers by length")


def values_by_step(values: Sequence[float], reward: float) -> str:
  """Value of one answer after every step."""
  steps = np.arange(1, len(values) + 1)
  with matplotlib.rc_context(STYLE):
    figure, axes = panel(6.4, 2.6)
    axes.axhline(
      reward, color=COLOURS["grey"], ls=(0, (4, 3)), lw=1.4, zorder=1,
      label=f"reward {reward:g}",
    )  # fmt: skip
    axes.plot(steps, values, color=COLOURS["blue"], marker="o", label="value")
    axes.set_ylim(min(-0.04, *values), max(1.06, *values))
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("after step")
    axes.set_ylabel("value")
    _legend_above(figure, axes, columns=2)
    return to_svg(figure, "Value of the worked example after every step")


def _legend_above(figure: Figure, axes: Axes, *, columns: int) -> None:
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0
  )


def _length_axis(axes: Axes) -> None:
  axes.set_xlim(0.05, 1.05)
  axes.set_xticks(np.arange(0.2, 1.01, 0.2).tolist())
  axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.grid(axis="x", visible=False)
  axes.set_xlabel("share of the answer read")


def _running_mean(numbers: np.ndarray, window: int) -> np.ndarray:
  """Centred mean; the window shrinks at both ends."""
  if window <= 1:
    return numbers
  kernel = np.ones(window)
  total = np.convolve(numbers, kernel, mode="same")
  return total / np.convolve(np.ones(numbers.size), kernel, mode="same")


def _spaced(xs: Sequence[float]) -> list[float]:
  """Those of the sorted `xs` whose labels do not touch on a doubling axis."""
  ticks: list[float] = []
  least = (math.log2(xs[-1]) - math.log2(xs[0])) / 9 if xs else 0.0
  for x in xs:
    if not ticks or math.log2(x) - math.log2(ticks[-1]) > least:
      ticks.append(x)
  return ticks
