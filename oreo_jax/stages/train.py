"""`oreo train`: trains `train.objective` on the trajectories."""

from __future__ import annotations

import dataclasses
import pathlib

from absl import logging

from oreo_jax import data
from oreo_jax.config import Config, ConfigError
from oreo_jax.stages import fitting
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace, describe
from oreo_jax.train import get_objective


def run(workspace: Workspace, say: Say) -> None:
  """Trains the objective; a stage that is done is left alone."""
  train_objective(workspace)
  objective = workspace.config.train.objective
  say(describe(objective, workspace.record(objective)))


def train_objective(workspace: Workspace) -> None:
  """Trains a policy (and a value network) on the trajectories.

  The folder of the stage is named after the objective.
  """
  objective = get_objective(workspace.config.train.objective)
  name = objective.name
  if workspace.is_done(TRAIN, name):
    return logging.info("%s is done: %s", name, workspace.path(name))
  settings = workspace.config.data
  trajectories = workspace.trajectories()
  used, held = data.split_by_problem(
    trajectories, fraction=settings.held_out, seed=settings.seed
  )
  granularity = workspace.config.train.granularity
  held_out = fitting.tokenize(workspace, held, granularity)
  sequences = objective.sequences(
    used,
    lambda chosen: fitting.tokenize(workspace, chosen, granularity),
    workspace.config.train,
  )
  if used and not sequences:
    right = sum(t.reward > 0.5 for t in used)
    raise ConfigError(
      f"config.train.objective={name!r} finds nothing to learn from in "
      f"{len(used)} trajectories, {right} of them right: rejection sampling "
      "needs right answers, DPO right and wrong ones to the same problem; "
      "collect more with --config.collect.samples, or start from a better "
      "policy"
    )
  stage_run = workspace.begin(TRAIN, name)
  fitted = fitting.fit(
    workspace, objective, sequences, workspace.start_policy(), held_out
  )
  stage_run.done(
    steps=fitted.steps,
    trajectories=len(used),
    held_out=len(held),
    sequences=fitted.sequences,
    too_long=fitted.dropped,
    **({"held_out_values": fitted.held_out} if fitted.held_out else {}),
  )
  return None


def with_objective(config: Config, objective: str) -> Config:
  """Returns the config with another objective to train."""
  train = dataclasses.replace(config.train, objective=objective)
  return dataclasses.replace(config, train=train)


def _reads(workspace: Workspace) -> dict[str, pathlib.Path]:
  return {
    "start": workspace.start_record(),
    "trajectories": workspace.trajectories_path(),
  }


def _leaves(config: Config) -> tuple[str, ...]:
  return (get_objective(config.train.objective).name,)


TRAIN = Stage(
  name="train",
  summary="trains train.objective on trajectories",
  run=run,
  settings=("seed", "init", "model", "data", "critic", "lora", "train"),
  reads=_reads,
  leaves=_leaves,
)
