"""The figures of a run as plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from oreo_jax.analysis.results import Evaluation, Figure, Method, ValueScores


class Row(NamedTuple):
  """One line of the accuracy table, as text."""

  method: str
  accuracy: str
  interval: str
  correct: str
  sequences: str
  tokens: str
  seconds: str


def table_rows(results: Evaluation) -> list[Row]:
  """The accuracy table as text, in the order of the evaluation."""
  return [
    Row(
      method=method["name"],
      accuracy=percent(method["accuracy"]),
      interval="{:.1f} to {:.1f}".format(
        *(100 * end for end in method["interval"])
      ),
      correct=f"{method['correct']:,}/{method['total']:,}",
      sequences=f"{method['budget']:,}",
      tokens=f"{method['tokens_per_problem']:,.0f}",
      seconds=f"{method['seconds']:,.1f}",
    )
    for method in results["methods"]
  ]


def format_table(results: Evaluation) -> str:
  """The accuracy table for the terminal.

  Args:
    results: as `read_results` returns them.

  Returns:
    Aligned plain text, a line a method under a header, no trailing line break.
    Without methods, a line a score of the trajectories.
  """
  if not results["methods"]:
    return _score_table(results["value_scores"])
  header = Row(
    "method", "solved", "95% interval", "correct", "sequences", "tokens",
    "seconds",
  )  # fmt: skip
  table = aligned([header, *table_rows(results)])
  return (
    f"{table}\n\nSequences and tokens are what the policy samples for one "
    "problem; seconds\nare for all problems."
  )


def _score_table(scores: ValueScores) -> str:
  header = ("score", "AUC within", "95% interval", "AUC pooled", "95% interval")
  table = aligned([header, *score_rows(scores)])
  return (
    f"{table}\n\nOf {scores['trajectories']:,} trajectories "
    f"{scores['right']:,} are right; of {scores['problems']:,} problems "
    f"{scores['mixed_problems']:,} have\nright and wrong ones. Intervals "
    "resample problems."
  )


def score_rows(scores: ValueScores) -> list[tuple[str, ...]]:
  """Name, AUC within problems, its interval, AUC pooled, its interval."""
  return [
    (
      score["name"],
      figure(score["within_auc"]),
      " to ".join(map(figure, score["within_interval"])),
      figure(score["pooled_auc"]),
      " to ".join(map(figure, score["pooled_interval"])),
    )
    for score in scores["scores"]
  ]


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Columns of equal width, the first to the left, a rule under the header.

  Args:
    rows: the header, then a row of cells a line.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    name, *figures = row
    cells = [
      name.ljust(widths[0]),
      *(cell.rjust(w) for cell, w in zip(figures, widths[1:], strict=True)),
    ]
    lines.append("  ".join(cells).rstrip())
  lines.insert(1, "-" * max(map(len, lines)))
  return "\n".join(lines)


def headline(results: Evaluation) -> str:
  """One sentence, or two, with the main figures of the run.

  Which figures they are does not depend on how good they are: the run's own
  policy decoding greedily, and its search at the largest budget. The best of
  several searches on the very problems that are reported would look better
  than it is.
  """
  problems = results["problems"]
  total = f"{problems:,} held-out problem{'s' if problems != 1 else ''}"
  if not results["methods"]:
    scores = results["value_scores"]
    value = scores["scores"][0]
    return (
      f"On {scores['trajectories']:,} trajectories of {total} the value ranks "
      "a right answer above a wrong one to the same problem with probability "
      f"{figure(value['within_auc'])} "
      f"({' to '.join(map(figure, value['within_interval']))}); pooled over "
      f"problems {figure(value['pooled_auc'])}."
    )
  greedy = greedy_methods(results)
  if not greedy:
    first = results["methods"][0]
    return f"{first['name']} solves {percent(first['accuracy'])} of {total}."
  own = own_policy(results)
  text = (
    f"Decoding greedily, {label_of(greedy[own])} solves "
    f"{percent(greedy[own]['accuracy'])} of {total}"
  )
  others = [
    f"{label_of(method)} {percent(method['accuracy'])}"
    for policy, method in greedy.items()
    if policy != own
  ]
  if others:
    *most, last = others
    text += f"; {', '.join(most)}{' and ' if most else ''}{last}"
  text += "."
  search = largest_search(results)
  if search is not None:
    text += (
      " Searched step by step with its value at the largest budget "
      f"({search['name']}), {percent(search['accuracy'])}."
    )
  return text


def greedy_methods(results: Evaluation) -> dict[str, Method]:
  """The method that decodes greedily, by policy."""
  return {m["policy"]: m for m in results["methods"] if m["search"] == "greedy"}


def own_policy(results: Evaluation) -> str:
  """The policy of the run's objective, which older results have last."""
  policies = list(greedy_methods(results))
  objective = results.get("objective", "")
  return objective if objective in policies else policies[-1]


def largest_search(results: Evaluation) -> Method | None:
  """The run's own policy searched step by step with the largest budget."""
  searches = [
    method
    for method in results["methods"]
    if method["search"] == "beam" and method["policy"] == own_policy(results)
  ]
  return max(searches, key=lambda method: method["budget"], default=None)


def label_of(method: Method) -> str:
  """The name of a method's policy, as the results say; its key in old ones."""
  return method.get("label", method["policy"])


def percent(share: float) -> str:
  """A share as a percentage with one decimal."""
  return f"{100 * share:.1f}%"


def figure(number: Figure) -> str:
  """Three decimals; a dash for what could not be measured."""
  missing = number is None or not math.isfinite(number)
  return "\N{EN DASH}" if missing else f"{number:.3f}"
