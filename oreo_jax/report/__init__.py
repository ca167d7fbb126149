"""The report of a run: one HTML file that needs no network, and a plain table.

Reads what the stages left in the work directory: `results.json` of the
evaluation, `<stage>/metrics.jsonl` of every training stage, and the resolved
configuration. What a run does not have is left out, and the report says so.
"""

import os
from pathlib import Path

from oreo_jax import files
from oreo_jax.analysis.results import read_config, read_results, read_stages
from oreo_jax.report.comparison import (
  format_comparison,
  format_rounds,
  write_comparison,
)
from oreo_jax.report.page import render
from oreo_jax.report.tables import format_table, headline

__all__ = [
  "format_comparison",
  "format_rounds",
  "format_table",
  "headline",
  "read_results",
  "render",
  "write_comparison",
  "write_report",
]

REPORT_NAME = "report.html"


def write_report(
  workdir: str | os.PathLike[str], path: Path | None = None
) -> Path:
  """Writes `report.html` of a run.

  Args:
    workdir: work directory with `results.json`.
    path: where the page goes; `report.html` in the work directory by default.

  Returns:
    Path of the report, which is replaced whole or not at all.

  Raises:
    ValueError: if `results.json` is missing or not one.
  """
  workdir = Path(workdir)
  page = render(
    read_results(workdir),
    stages=read_stages(workdir),
    config=read_config(workdir),
  )
  path = path or workdir / REPORT_NAME
  files.write_text(path, page)
  return path
