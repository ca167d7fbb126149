"""`oreo collect`: samples trajectories and has the task grade them."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
from absl import logging

from oreo_jax import data, decode
from oreo_jax.data import construct
from oreo_jax.rollout import (
  Player,
  collect_answers,
  collect_episodes,
  grading_counts,
)
from oreo_jax.stages.records import describe
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace
from oreo_jax.tasks.environment import AgentTask


def run(workspace: Workspace, say: Say) -> None:
  """Collects trajectories; a stage that is done is left alone."""
  collect(workspace)
  say(describe("collect", workspace.record("collect")))


def collect(workspace: Workspace) -> None:
  """Samples answers to training problems and writes them graded."""
  task = workspace.need_task(
    "the collect stage needs problems",
    ", or bring trajectories with --config.data.path=FILE",
  )
  if workspace.is_done(COLLECT):
    return logging.info("collect is done: %s", workspace.path("collect"))
  settings = workspace.config.collect
  end = settings.skip + settings.problems if settings.problems else None
  problems = task.problems("train", end)[settings.skip :]
  stage_run = workspace.begin(COLLECT)
  graded_before = grading_counts(task)
  folder = workspace.path("collect")
  layout = workspace.layout("lm")
  sampler = decode.Sampler.of(settings)
  reasons: dict[str, int] | None = None
  with jax.set_mesh(layout.mesh):
    policy = layout.place(workspace.start_policy())
    if isinstance(task, AgentTask):
      collected, reasons = collect_episodes(
        Player(
          policy,
          layout.model,
          workspace.codec,
          task,
          workspace.config.agent,
          settings.seed,
          settings.batch_size,
          sampler,
        ),
        problems,
        folder / "episodes",
        num_samples=settings.samples,
        first_number=settings.skip,
      )
    else:
      collected = collect_answers(
        policy,
        problems,
        task,
        workspace.codec,
        layout.model,
        folder / "answers",
        seed=settings.seed,
        num_samples=settings.samples,
        max_new_tokens=settings.max_new_tokens,
        slots=settings.batch_size,
        sampler=sampler,
        first_number=settings.skip,
      )
  sampled = collected.trajectories
  chosen = (
    construct.select_balanced(sampled, seed=settings.seed)
    if settings.select == "balanced"
    else sampled
  )
  if workspace.is_chief:
    data.save_trajectories(folder / "trajectories.jsonl", chosen)
  usage = collected.usage
  stage_run.done(
    problems=len(problems),
    sampled=len(sampled),
    kept=len(chosen),
    success=float(np.mean([each.reward for each in sampled])),
    truncated=float(np.mean([each.truncated for each in sampled])),
    blank=sum(not each.turns[-1].content.strip() for each in sampled),
    grading=dict(grading_counts(task) - graded_before),
    tokens_per_second=usage.tokens / max(collected.seconds, 1e-9),
    **({"slots_busy": usage.share} if reasons is None else {"ended": reasons}),
  )
  return None


def _reads(workspace: Workspace) -> dict[str, pathlib.Path]:
  return {"start": workspace.start_record()}


COLLECT = Stage(
  name="collect",
  summary="samples and grades trajectories",
  run=run,
  settings=(
    "seed",
    "init",
    "model",
    "task",
    "agent",
    "data",
    "collect",
    "sampling",
  ),
  reads=_reads,
  leaves=lambda config: ("collect",),
)
