"""`oreo report`: the page of a run; nothing but the page is written."""

from __future__ import annotations

from oreo_jax import report
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace


def run(workspace: Workspace, say: Say) -> None:
  """Draws `report.html` from what the stages left."""
  if workspace.is_chief:
    say(f"report: {report.write_report(workspace.directory)}")


REPORT = Stage(
  name="report",
  summary="draws the figures",
  run=run,
  leaves=lambda config: ("report.html",),
)
