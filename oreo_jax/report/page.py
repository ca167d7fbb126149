"""The page: plots and tables put into the template."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from oreo_jax.analysis.results import Evaluation, Example, Method, Values
from oreo_jax.report import plots
from oreo_jax.report.style import colour_of
from oreo_jax.report.tables import (
  figure,
  greedy_methods,
  headline,
  label_of,
  largest_search,
  own_policy,
  percent,
  score_rows,
  table_rows,
)

_SEARCH_NAMES = {
  "beam": "Step beam, by value",
  "best_of_n": "Best of N, by value",
  "best_of_k": "Best of K actions a turn, by value",
  "weighted_vote": "Vote weighted by value",
  "vote": "Majority vote",
}
# The curves to see first; the others are a click away.
_MAIN_CURVES = (
  "loss",
  "accuracy",
  "policy/nll",
  "policy/loss",
  "value/loss",
  "value/explained_variance",
  "policy/kl",
  "policy/entropy",
)
# Groups and names that say nothing about learning: rates and clocks.
_UNPLOTTED = {"lr", "seconds", "time", "tokens", "epoch", "count"}


class Curves(NamedTuple):
  """The training curves of one stage."""

  stage: str
  main: list[Markup]
  others: list[Markup]


def render(
  results: Evaluation,
  *,
  stages: Mapping[str, Sequence[Mapping[str, float]]],
  config: str | None,
) -> str:
  """The page.

  Args:
    results: as `read_results` returns them.
    stages: rows of metrics by stage.
    config: text of the resolved configuration, or None.

  Returns:
    HTML with everything in it.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("oreo_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    "figure": figure,
    "signed": _signed,
    "duration": _duration,
  }
  values = results.get("values")
  scores = results.get("value_scores")
  example = results.get("example")
  timings = results.get("timings") or {}
  budget_plots = _budget_plots(results)
  curves = _curves(stages)
  sections = {
    "accuracy": results["methods"],
    "search at several budgets": budget_plots,
    "training curves": curves,
    "the value": values,
    "a worked example": example,
    "time by stage": timings,
    "the configuration": config,
  }
  return environment.get_template("report.html").render(
    task=results["task"],
    seed=results["seed"],
    problems=results["problems"],
    headline=headline(results),
    tiles=_tiles(results),
    accuracy_plot=_accuracy_plot(results) if results["methods"] else "",
    rows=table_rows(results),
    budget_plots=budget_plots,
    curves=curves,
    value_plots=_value_plots(values) if values else {},
    values=values,
    score_rows=score_rows(scores) if scores else [],
    example=example,
    example_plot=_example_plot(example) if example else "",
    meter=_meter(example) if example else None,
    timings=timings,
    config=config,
    absent=[name for name, shown in sections.items() if not shown],
  )


def _tiles(results: Evaluation) -> list[tuple[str, str, str]]:
  """(figure, what it is, remark) of the few numbers to see first."""
  greedy = greedy_methods(results)
  tiles = []
  if greedy:
    own = greedy[own_policy(results)]
    remarks = [
      f"{100 * (own['accuracy'] - other['accuracy']):+.1f} on {label_of(other)}"
      for other in greedy.values()
      if other is not own
    ]
    remark = f"{', '.join(remarks)} (points)" if remarks else ""
    tiles.append((percent(own["accuracy"]), f"{label_of(own)}, greedy", remark))
    search = largest_search(results)
    if search is not None:
      remark = f"{search['tokens_per_problem']:,.0f} tokens a problem"
      tiles.append((percent(search["accuracy"]), search["name"], remark))
  values = results.get("values")
  if values:
    tiles.append(
      (
        figure(values["within_problem_auc"][-1]),
        "within-problem AUC",
        " to ".join(map(figure, values["within_problem_auc_interval"][-1]))
        + ", value of finished answers",
      )
    )
  timings = results.get("timings")
  if timings:
    total = sum(timings.values())
    tiles.append((_duration(total), "for the whole run", " + ".join(timings)))
  return tiles


def _accuracy_plot(results: Evaluation) -> Markup:
  """Policies without search, and every search at its largest budget."""
  largest: dict[tuple[str, str], int] = {}
  for method in results["methods"]:
    key = (method["policy"], method["search"])
    largest[key] = max(largest.get(key, 0), method["budget"])
  bars = [
    plots.Bar(
      method["name"],
      method["accuracy"],
      method["interval"],
      colour_of(method),
    )
    for method in results["methods"]
    if method["budget"] == largest[method["policy"], method["search"]]
  ]
  return Markup(plots.accuracies(bars))


def _budget_plots(results: Evaluation) -> list[Markup]:
  """Accuracy against sequences and against tokens; none without budgets."""
  lines: dict[tuple[str, str], list[Method]] = {}
  for method in results["methods"]:
    if method["search"] in _SEARCH_NAMES:
      key = (method["search"], method["policy"])
      lines.setdefault(key, []).append(method)
  if not any(len(methods) > 1 for methods in lines.values()):
    return []
  policies = {policy for _, policy in lines}
  greedy = greedy_methods(results)
  reference = None
  if greedy:
    own = greedy[own_policy(results)]
    reference = (f"{label_of(own)}, greedy", own["accuracy"])
  drawn = []
  cost: Callable[[Method], float]
  for cost, label in (
    (lambda method: method["budget"], "sequences a problem"),
    (lambda method: method["tokens_per_problem"], "tokens a problem"),
  ):
    series = {}
    for search in _SEARCH_NAMES:
      for policy in sorted(policies):
        methods = lines.get((search, policy), [])
        name = _SEARCH_NAMES[search]
        if len(policies) > 1 and methods:
          name += f", {label_of(methods[0])}"
        points = [
          plots.Point(cost(m), m["accuracy"], m["interval"])
          for m in methods
          if cost(m) > 0
        ]
        if points:
          series[name] = points
    svg = plots.budgets(series, reference=reference, x_label=label)
    drawn.append(Markup(svg))
  return drawn


def _curves(
  stages: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[Curves]:
  curves = []
  for stage, rows in stages.items():
    columns: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
      for name, number in row.items():
        if name != "step" and math.isfinite(number):
          columns.setdefault(name, []).append((row["step"], number))
    drawn = {
      name: Markup(plots.curve(stage, name, *np.array(points).T))
      for name, points in columns.items()
      if len(points) > 1 and not _UNPLOTTED & set(name.split("/"))
    }
    if drawn:
      main = [drawn.pop(name) for name in _MAIN_CURVES if name in drawn]
      curves.append(Curves(stage, main, list(drawn.values())))
  return curves


def _value_plots(values: Values) -> dict[str, Any]:
  """Plots by place in the template; null figures are nan to NumPy."""
  tenths = values["tenths"]
  histogram = values["histogram"]
  shown = sorted({round(f * (len(tenths) - 1)) for f in (0.1, 0.5, 1.0)})
  return {
    "auc": Markup(
      plots.auc_by_length(
        tenths,
        values["within_problem_auc"],
        values["within_problem_auc_interval"],
        values.get("pooled_auc"),
      )
    ),
    "means": Markup(
      plots.means_by_length(
        tenths, values["mean_correct"], values["mean_wrong"]
      )
    ),
    "calibration": Markup(plots.calibration(**values["calibration"])),
    "histograms": [
      Markup(
        plots.value_histogram(
          f"after {100 * tenths[i]:.0f}% of the answer",
          histogram["edges"],
          histogram["correct"][i],
          histogram["wrong"][i],
        )
      )
      for i in shown
    ],
  }


def _example_plot(example: Example) -> Markup:
  """Empty for an answer that ended before its first token."""
  steps = [step["value"] for step in example["steps"]]
  return Markup(plots.values_by_step(steps, example["reward"]) if steps else "")


def _meter(example: Example) -> Callable[[float], float]:
  """Returns a function that says where a value lies, in percent.

  The scale reaches over all values of the example, and from 0 to 1 at least.
  """
  values = [step["value"] for step in example["steps"]]
  low, high = min([0.0, *values]), max([1.0, *values])
  return lambda value: 100 * (value - low) / (high - low)


def _signed(number: float) -> str:
  """With a real minus sign, so that columns of figures line up."""
  return f"{number:+.3f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
