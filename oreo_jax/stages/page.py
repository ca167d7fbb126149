"""`oreo report`: the page of a run; nothing but the page is written."""

from __future__ import annotations

import errno
import pathlib

from oreo_jax import report
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace

# What writing into a folder fails with that one may only read.
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def run(workspace: Workspace, say: Say) -> None:
  """Draws `report.html` from what the stages left.

  The page of a work directory that cannot be written to goes into the current
  folder instead.
  """
  if not workspace.is_chief:
    return
  directory = workspace.directory
  try:
    page = report.write_report(directory)
  except OSError as error:
    if error.errno not in _READ_ONLY:
      raise
    say(f"{directory} cannot be written to: the page goes into this folder")
    name = f"{directory.resolve().name}-report.html"
    page = report.write_report(directory, pathlib.Path(name))
  say(f"report: {page}")


REPORT = Stage(
  name="report",
  summary="draws the figures",
  run=run,
  leaves=lambda config: ("report.html",),
)
