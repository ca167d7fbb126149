"""`oreo sft`: supervised fine-tuning on the task's demonstrations."""

from __future__ import annotations

from collections import Counter

from absl import logging

from oreo_jax.stages import fitting
from oreo_jax.stages.records import describe
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train import OBJECTIVES


def run(workspace: Workspace, say: Say) -> None:
  """Fine-tunes the starting policy; a stage that is done is left alone."""
  fine_tune(workspace)
  say(describe("sft", workspace.record("sft")))


def fine_tune(workspace: Workspace) -> None:
  """Fine-tunes the starting policy on the task's demonstrations."""
  task = workspace.need_task(
    "the sft stage needs demonstrations",
    ", or start from a checkpoint with --config.init=DIR",
  )
  if workspace.is_done(SFT):
    return logging.info("sft is done: %s", workspace.path("sft"))
  config = workspace.config
  demonstrations = [
    workspace.codec.trajectory(problem, answer, 1.0, id=problem.id)
    for problem, answer in task.demonstrations(config.sft.examples or None)
  ]
  skipped: Counter[str] = Counter()
  sequences = fitting.tokenize(workspace, demonstrations, skipped=skipped)
  stage_run = workspace.begin(SFT)
  fitted = fitting.fit(
    workspace, OBJECTIVES["sft"], sequences, workspace.initial_policy
  )
  stage_run.done(
    steps=fitted.steps,
    demonstrations=fitted.sequences,
    left_out=dict(skipped) | {"longer than a row": fitted.dropped},
  )
  return None


SFT = Stage(
  name="sft",
  summary="fine-tunes on the task's demonstrations",
  run=run,
  trains=True,
  settings=("seed", "init", "model", "task", "data", "sft"),
  leaves=lambda config: ("sft", "tokenizer"),
)
