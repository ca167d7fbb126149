"""The results of `oreo compare` and `oreo iterate`, as text and as a page."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from oreo_jax import files
from oreo_jax.analysis.results import Comparison, Round
from oreo_jax.report import comparison_plots as plots
from oreo_jax.report.style import colour_of
from oreo_jax.report.tables import aligned, percent

PAGE_NAME = "report.html"

_HEADER = (
  "method", "lr", "solved", "sd", "seeds", "- SFT", "95% interval", "p",
  "s/run",
)  # fmt: skip
_LEVEL = 0.05  # p-values below it get a star


def method_labels(results: Comparison) -> dict[str, str]:
  """The names of the methods, as the results say; the keys in old ones."""
  return {m["method"]: m.get("label", m["method"]) for m in results["methods"]}


def method_rows(results: Comparison) -> list[tuple[str, ...]]:
  """The main table as text, a tuple of cells a method."""
  rows: list[tuple[str, ...]] = []
  for method in results["methods"]:
    against = method["against_sft"]
    gain = interval = p_value = ""
    if against is not None:
      gain = _signed(against["difference"])
      interval = " to ".join(map(_signed, against["interval"]))
      p_value = _p(against.get("p_value", max(against["p_values"])))
    rows.append(
      (
        method.get("label", method["method"]),
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


def searched_rows(results: Comparison) -> list[tuple[str, str, str]]:
  """(method, what was tried, remark) of the searches for a learning rate."""
  rows = []
  labels = method_labels(results)
  for name, chosen in results["chosen"].items():
    # A grid of one rate was not searched: there was nothing to choose.
    tried = results["searched"].get(name, ())
    cells = []
    for cell in tried:
      figure = "diverged" if cell["diverged"] else percent(cell["accuracy"])
      mark = "*" if cell["lr"] == chosen else ""
      cells.append(f"{cell['lr']:.3g}: {figure}{mark}")
    rates = [cell["lr"] for cell in tried]
    if len(rates) < 2:
      cells = [f"{chosen:.3g}"]
      remark = "one rate, not searched"
    elif chosen not in (min(rates), max(rates)):
      remark = ""
    elif len(rates) == 2:
      remark = "best at the edge of a grid of two"
    else:
      remark = "best at the edge of the grid"
    rows.append((labels[name], "  ".join(cells), remark))
  return rows


def contrast_rows(results: Comparison) -> list[tuple[str, ...]]:
  """Every method against every one above it, in points.

  Returns:
    The header and a row a method: the lower triangle of a matrix whose columns
    are numbered as its rows. Empty with fewer than three methods, of which the
    main table says everything.
  """
  methods = [method["method"] for method in results["methods"]]
  if len(methods) < 3 or "contrasts" not in results:
    return []
  cells = {
    (pair["method"], pair["other"]): _signed(pair["difference"])
    + "*" * ((pair["p_value"] < _LEVEL) + (pair["p_holm"] < _LEVEL))
    for pair in results["contrasts"]
  }
  labels = method_labels(results)
  numbers = range(1, len(methods))
  rows = [("method less the one of column", *map(str, numbers))]
  for number, method in enumerate(methods, start=1):
    ahead = [cells.get((method, other), "") for other in methods[:-1]]
    rows.append((f"{number} {labels[method]}", *ahead))
  return rows


def notes(results: Comparison) -> list[str]:
  """Returns what the reader of the main table must know, as sentences."""
  seeds, minutes = len(results["seeds"]), results["seconds"] / 60
  spread = (
    f"sd is the standard deviation over {seeds} seeds"
    if seeds > 1
    else "one seed was trained"
  )
  sentences = [
    f"Every policy decodes greedily on {results['problems']:,} held-out "
    f"problems of the {results['split']} split; {spread}."
  ]
  gains = [m["against_sft"] for m in results["methods"] if m["against_sft"]]
  if gains and "p_value" not in gains[0]:
    sentences.append(
      "The interval and the p of the difference to SFT take the trained "
      "policies as given: they come from an earlier version, which did not "
      "count other seeds. Another `oreo compare` writes both anew."
    )
  elif gains and seeds > 1:
    sentences.append(
      "The interval of the difference to SFT is of the mean over seeds and "
      f"problems: it counts that other seeds than these {seeds} would have "
      "trained other policies, and that other problems would have been drawn. "
      "Its p is of the same test, not corrected for the number of methods."
    )
  elif gains:
    sentences.append(
      "The interval of the difference to SFT counts that other problems would "
      "have been drawn. With one seed neither it nor p, which is McNemar's, "
      "says anything of how another seed would train."
    )
  sentences.append(
    "s/run: seconds to train once, without sampling. The comparison took "
    f"{minutes:.0f} minutes in all."
  )
  return sentences


def contrast_note(results: Comparison) -> str:
  """Returns what the stars of the matrix mean."""
  pairs = len(results["contrasts"])
  return (
    "Points by which the method of the row is ahead of that of the column. "
    f"*: p below {_LEVEL}; **: also after Holm's correction for the {pairs} "
    "pairs."
  )


def format_comparison(results: Comparison) -> str:
  """The tables for the terminal, no trailing line break."""
  blocks = [aligned([_HEADER, *method_rows(results)]), _wrapped(notes(results))]
  matrix = contrast_rows(results)
  if matrix:
    blocks += [aligned(matrix), _wrapped([contrast_note(results)])]
  if results["chosen"]:
    blocks.append(
      f"learning rates tried on {results['validation_problems']:,} validation "
      f"problems, seed {results['seeds'][0]} (* chosen)\n"
      + aligned([("method", "lr: solved", ""), *searched_rows(results)])
    )
  labels = method_labels(results)
  for name, runs in results["rounds"].items():
    for seed, rows in runs.items():
      title = f"rounds of {labels[name]}, seed {seed}"
      blocks.append(f"{title}\n{format_rounds(rows)}")
  return "\n\n".join(blocks)


def format_rounds(rows: Sequence[Round]) -> str:
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
  return aligned([header, *cells])


def write_comparison(
  directory: str | os.PathLike[str], results: Comparison
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
    notes=notes(results),
    contrasts=contrast_rows(results),
    contrast_note=contrast_note(results) if contrast_rows(results) else "",
    searched=searched_rows(results),
    methods_plot=Markup(_methods_plot(results)),
    granularities_plot=Markup(_granularities_plot(results)),
    rounds_plot=Markup(_rounds_plot(results)),
  )
  path = Path(directory) / PAGE_NAME
  files.write_text(path, page)
  return path


def _methods_plot(results: Comparison) -> str:
  labels = method_labels(results)
  return plots.methods(
    [
      plots.Runs(labels[row["method"]], row["accuracies"], colour_of(row))
      for row in results["methods"]
    ]
  )


def _granularities_plot(results: Comparison) -> str:
  """Empty without an objective at two granularities or more."""
  sft = results["methods"][0]
  by_objective: dict[str, dict[str, Sequence[float]]] = {}
  for row in results["methods"][1:]:
    if "granularity" in row:
      runs = by_objective.setdefault(row["objective"], {})
      runs[row["granularity"]] = row["accuracies"]
  for runs in by_objective.values():
    if len(runs) > 1:
      return plots.granularities(
        runs, start=(method_labels(results)[sft["method"]], sft["accuracies"])
      )
  return ""


def _rounds_plot(results: Comparison) -> str:
  """Empty without rounds."""
  labels = method_labels(results)
  runs = {
    labels[name]: [[row["accuracy"] for row in rows] for rows in seeds.values()]
    for name, seeds in results["rounds"].items()
  }
  return plots.rounds(runs) if runs else ""


def _wrapped(sentences: Sequence[str]) -> str:
  return textwrap.fill(" ".join(sentences), width=80)


def _signed(share: float) -> str:
  return f"{100 * share:+.1f}"


def _p(p_value: float) -> str:
  return "<0.0001" if p_value < 1e-4 else f"{p_value:.4f}"
