"""`oreo run`: from demonstrations to the report, one stage after the other."""

from __future__ import annotations

import time

from oreo_jax import files
from oreo_jax.stages import collect, evaluate, page, sft, train
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace


def run(workspace: Workspace, say: Say) -> None:
  """Runs every stage that is not done yet."""
  start = time.monotonic()
  sft.run(workspace, say)
  collect.run(workspace, say)
  baselines = workspace.config.baselines
  updates = train.planned_updates(workspace) if baselines else 0
  for name in baselines:
    train.run(train.with_baseline(workspace, name, updates), say)
  train.run(workspace, say)
  evaluate.run(workspace, say)
  page.run(workspace, say)
  if workspace.is_chief:
    results = files.read_json(workspace.directory / "results.json")
    timings = "  ".join(f"{k} {v:.0f}" for k, v in results["timings"].items())
    say(f"seconds: {timings}  whole command {time.monotonic() - start:.0f}")


RUN = Stage(
  name="run",
  summary="all of these",
  run=run,
  trains=True,
  leaves=lambda config: (
    *sft.SFT.leaves(config),
    *collect.COLLECT.leaves(config),
    *config.baselines,
    *train.TRAIN.leaves(config),
    *evaluate.EVALUATE.leaves(config),
  ),
)
