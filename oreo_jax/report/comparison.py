"""What `oreo compare` and `oreo iterate` found, as text and as a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from oreo_jax import files
from oreo_jax.report import comparison_plots as plots
from oreo_jax.report.results import percent

PAGE_NAME = "report.html"

NAMES = {
  "sft": "SFT",
  "rejection": "Rejection sampling",
  "dpo": "DPO",
  "kto": "KTO",
  "dqo": "DQO",
  "oreo_token": "OREO, token",
  "oreo_step": "OREO, step",
  "oreo_response": "OREO, response",
}
_HEADER = (
  "method", "lr", "solved", "sd", "seeds", "- SFT", "95% interval", "p",
  "s/run",
)  # fmt: skip


def method_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """The main table as text, a tuple of cells a method."""
  rows: list[tuple[str, ...]] = []
  for method in results["methods"]:
    against = method["against_sft"]
    gain = interval = p_value = ""
    if against is not None:
      gain = _signed(against["difference"])
      interval = " to ".join(map(_signed, against["interval"]))
      p_value = _p(max(against["p_values"]))
    rows.append(
      (
        NAMES[method["method"]],
        "" if method["lr"] is None else f"{method['lr']:.3g}",
        percent(method["mean"]),
        "" if method["std"] is None else f"{100 * method['std']:.1f}",
        " ".join(f"{100 * a:.1f}" for a in method["accuracies"]),
        gain,
        interval,
        p_value,
        f"{method['seconds']:.0f}",
      )
    )
  return rows


def searched_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """(method, what was tried, remark) of the searches for a learning rate."""
  rows = []
  for name, tried in results["searched"].items():
    chosen = results["chosen"][name]
    cells = []
    for cell in tried:
      figure = "diverged" if cell["diverged"] else percent(cell["accuracy"])
      mark = "*" if cell["lr"] == chosen else ""
      cells.append(f"{cell['lr']:.3g}: {figure}{mark}")
    rates = [cell["lr"] for cell in tried]
    # In a grid of two every rate is an edge.
    edge = len(rates) > 2 and chosen in (min(rates), max(rates))
    remark = "best at the edge of the grid" if edge else ""
    rows.append((NAMES[name], "  ".join(cells), remark))
  return rows


def format_comparison(results: Mapping[str, Any]) -> str:
  """The tables for the terminal, no trailing line break."""
  seeds, problems = len(results["seeds"]), results["problems"]
  parts = [
    _aligned(_HEADER, method_rows(results)),
    f"greedy decoding on {problems:,} held-out problems, {seeds} "
    f"seed{'s' if seeds != 1 else ''}; p: McNemar, the largest of the seeds; "
    f"{results['seconds'] / 60:.0f} minutes in all",
  ]
  if results["searched"]:
    parts += [
      "",
      f"learning rates tried on {results['validation_problems']:,} validation "
      f"problems, seed {results['seeds'][0]} (* chosen)",
      _aligned(("method", "lr: solved", ""), searched_rows(results)),
    ]
  for name, runs in results["rounds"].items():
    for seed, rows in runs.items():
      parts += ["", f"rounds of {NAMES[name]}, seed {seed}"]
      parts.append(format_rounds(rows))
  return "\n".join(parts)


def format_rounds(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table of rounds for the terminal; round 0 is where they start."""
  cells = []
  for row in rows:
    sampled = row.get("success")
    cells.append(
      (
        str(row["round"]),
        percent(row["accuracy"]),
        "{:.1f} to {:.1f}".format(*(100 * end for end in row["interval"])),
        f"{row['correct']:,}/{row['total']:,}",
        "" if sampled is None else percent(sampled),
        f"{row['trajectories']:,}" if "trajectories" in row else "",
        f"{row['seconds']:.0f}" if "seconds" in row else "",
      )
    )
  header = (
    "round", "solved", "95% interval", "correct", "samples right",
    "trajectories", "seconds",
  )  # fmt: skip
  return _aligned(header, cells)


def write_comparison(
  directory: str | os.PathLike[str], results: Mapping[str, Any]
) -> Path:
  """Writes the page of a comparison.

  Args:
    directory: gets `report.html`, replaced whole or not at all.
    results: what `oreo compare` wrote to its `results.json`.

  Returns:
    Path of the page.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("oreo_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  page = environment.get_template("comparison.html").render(
    results=results,
    header=_HEADER,
    rows=method_rows(results),
    searched=searched_rows(results),
    names=NAMES,
    methods_plot=Markup(_methods_plot(results)),
    granularities_plot=Markup(_granularities_plot(results)),
    rounds_plot=Markup(_rounds_plot(results)),
  )
  path = Path(directory) / PAGE_NAME
  files.write_text(path, page)
  return path


def _methods_plot(results: Mapping[str, Any]) -> str:
  runs = {m["method"]: m["accuracies"] for m in results["methods"]}
  return plots.methods({NAMES[name]: runs[name] for name in runs})


def _granularities_plot(results: Mapping[str, Any]) -> str:
  """Empty with fewer than two granularities."""
  runs = {m["method"]: m["accuracies"] for m in results["methods"]}
  found = {
    kind: runs[f"oreo_{kind}"]
    for kind in ("token", "step", "response")
    if f"oreo_{kind}" in runs
  }
  return plots.granularities(found, sft=runs["sft"]) if len(found) > 1 else ""


def _rounds_plot(results: Mapping[str, Any]) -> str:
  """Empty without rounds."""
  runs = {
    NAMES[name]: [[row["accuracy"] for row in rows] for rows in seeds.values()]
    for name, seeds in results["rounds"].items()
  }
  return plots.rounds(runs) if runs else ""


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Columns of text, the first one to the left, with a rule below the head."""
  table = [header, *rows]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = []
  for cells in table:
    first, *others = cells
    padded = [
      first.ljust(widths[0]),
      *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True)),
    ]
    lines.append("  ".join(padded).rstrip())
  lines.insert(1, "-" * max(map(len, lines)))
  return "\n".join(lines)


def _signed(share: float) -> str:
  return f"{100 * share:+.1f}"


def _p(p_value: float) -> str:
  return "<0.0001" if p_value < 1e-4 else f"{p_value:.4f}"
