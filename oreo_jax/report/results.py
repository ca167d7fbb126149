"""What a run left behind: reading it, and its figures as plain text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oreo_jax import metrics

RESULTS_NAME = "results.json"
CONFIG_NAME = "config.py"

POLICY_NAMES = {
  "sft": "supervised fine-tuning",
  "rejection": "rejection sampling",
  "oreo": "OREO",
}
_METHOD_KEYS = (
  "name", "policy", "search", "budget", "accuracy", "interval", "correct",
  "total", "tokens_per_problem", "seconds",
)  # fmt: skip


class Row(NamedTuple):
  """One line of the accuracy table, as text."""

  method: str
  accuracy: str
  interval: str
  correct: str
  sequences: str
  tokens: str
  seconds: str


def read_results(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads and checks `results.json`.

  Args:
    workdir: Work directory of the run.

  Returns:
    The results: "task", "seed", "problems", "methods", and where the run has
    them "values", "example" and "timings".

  Raises:
    ValueError: If the file is missing, not JSON, or lacks a key.
  """
  path = Path(workdir) / RESULTS_NAME
  if not path.exists():
    raise ValueError(
      f"{path}: not found; `oreo evaluate --workdir={workdir}` writes it"
    )
  try:
    results = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path}: not JSON ({error}); run `oreo evaluate` again"
    ) from error
  for key in ("task", "seed", "problems", "methods"):
    if key not in results:
      raise ValueError(f"{path}: no {key!r}; run `oreo evaluate` again")
  if not results["methods"] and not results.get("value_scores"):
    raise ValueError(f"{path}: no methods; run `oreo evaluate` again")
  for index, method in enumerate(results["methods"]):
    missing = [key for key in _METHOD_KEYS if key not in method]
    if missing:
      raise ValueError(
        f"{path}: methods[{index}] has no {missing[0]!r}; run `oreo evaluate` "
        "again"
      )
  return results


def read_stages(
  workdir: str | os.PathLike[str],
) -> dict[str, list[dict[str, float]]]:
  """Reads the metrics of every stage that has some.

  Args:
    workdir: Work directory of the run.

  Returns:
    Rows by stage name, stages in the order in which they were first written.
  """
  found = sorted(
    Path(workdir).glob(f"*/{metrics.FILE_NAME}"),
    key=lambda path: (path.stat().st_mtime, path),
  )
  rows = {path.parent.name: metrics.read_metrics(path) for path in found}
  return {stage: stage_rows for stage, stage_rows in rows.items() if stage_rows}


def read_config(workdir: str | os.PathLike[str]) -> str | None:
  """Text of the resolved configuration, None if the run did not save it."""
  path = Path(workdir) / CONFIG_NAME
  return path.read_text(encoding="utf-8") if path.exists() else None


def table_rows(results: Mapping[str, Any]) -> list[Row]:
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


def format_table(results: Mapping[str, Any]) -> str:
  """The accuracy table for the terminal.

  Args:
    results: As `read_results` returns them.

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
  return f"{table}\n\nsequences and tokens: policy samples a problem"


def _score_table(scores: Mapping[str, Any]) -> str:
  header = ("score", "AUC within", "95% interval", "AUC pooled", "95% interval")
  table = aligned([header, *score_rows(scores)])
  return (
    f"{table}\n\n{scores['right']:,} of {scores['trajectories']:,} "
    f"trajectories are right; {scores['mixed_problems']:,} of "
    f"{scores['problems']:,} problems have both kinds"
  )


def score_rows(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """Name, AUC within problems, its interval, AUC pooled, its interval."""
  return [
    (
      score["name"],
      f"{score['within_auc']:.3f}",
      "{:.3f} to {:.3f}".format(*score["within_interval"]),
      f"{score['pooled_auc']:.3f}",
      "{:.3f} to {:.3f}".format(*score["pooled_interval"]),
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


def headline(results: Mapping[str, Any]) -> str:
  """One sentence, or two, with the main figures of the run."""
  greedy = greedy_methods(results)
  problems = results["problems"]
  if not results["methods"]:
    found = results["value_scores"]
    value = found["scores"][0]
    low, high = value["within_interval"]
    return (
      f"On {found['trajectories']:,} trajectories of {problems:,} held-out "
      "problems the value ranks a right answer above a wrong one to the same "
      f"problem with probability {value['within_auc']:.3f} ({low:.3f} to "
      f"{high:.3f}); pooled over problems {value['pooled_auc']:.3f}."
    )
  total = f"{problems:,} held-out problem{'s' if problems != 1 else ''}"
  if "oreo" not in greedy:
    best = max(results["methods"], key=lambda method: method["accuracy"])
    return f"{best['name']} solves {percent(best['accuracy'])} of {total}."
  oreo = greedy["oreo"]["accuracy"]
  others = [
    f"{POLICY_NAMES[policy]} {percent(greedy[policy]['accuracy'])}"
    for policy in ("sft", "rejection")
    if policy in greedy
  ]
  text = f"Decoding greedily, OREO solves {percent(oreo)} of {total}"
  if others:
    text += f"; {' and '.join(others)}"
  text += "."
  searches = [m for m in results["methods"] if m["search"] == "beam"]
  if searches:
    best = max(searches, key=lambda method: method["accuracy"])
    text += (
      f" Searched step by step with its value ({best['name']}), "
      f"{percent(best['accuracy'])}."
    )
  return text


def greedy_methods(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """The method that decodes greedily, by policy."""
  return {m["policy"]: m for m in results["methods"] if m["search"] == "greedy"}


def percent(share: float) -> str:
  """A share as a percentage with one decimal."""
  return f"{100 * share:.1f}%"
