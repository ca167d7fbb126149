"""`oreo train`: trains `train.objective` on the trajectories."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from absl import logging

from oreo_jax import data
from oreo_jax.config import Config, ConfigError
from oreo_jax.stages import fitting
from oreo_jax.stages.records import describe
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train import Objective, get_objective


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
  used, held = _split(workspace)
  granularity = workspace.config.train.granularity
  held_out = fitting.tokenize(workspace, held, granularity)
  skipped: Counter[str] = Counter()
  sequences = _sequences(workspace, objective, used, skipped)
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
    workspace, objective, sequences, workspace.start_policy, held_out
  )
  stage_run.done(
    steps=fitted.steps,
    trajectories=len(used),
    held_out=len(held),
    sequences=fitted.sequences,
    left_out=dict(skipped) | {"longer than a row": fitted.dropped},
    **({"held_out_values": fitted.held_out} if fitted.held_out else {}),
  )
  return None


def planned_updates(workspace: Workspace) -> int:
  """Returns how many updates `train.objective` makes on the trajectories.

  Baselines that are compared with it make as many.
  """
  objective = get_objective(workspace.config.train.objective)
  config = objective.fit_rows(workspace.config)
  used, _ = _split(workspace)
  sequences = _sequences(workspace, objective, used)
  mesh = workspace.mesh
  loader = fitting.make_loader(config, objective, sequences, mesh)
  return fitting.num_updates(objective.stage(config), loader)


def with_baseline(workspace: Workspace, name: str, updates: int) -> Workspace:
  """Returns the run's folder with the settings of a baseline.

  They are those of its row in `oreo compare`: OREO's temperature and rate
  would destroy DPO.

  Args:
    workspace: of the run.
    name: an objective; its folder is named after it.
    updates: how many it makes, unless its row says epochs.
  """
  config = workspace.config
  objective = get_objective(name, "baselines")
  if objective.methods:
    method = objective.methods[0].given(config)
    lr = config.train.lr * method.lr_scale
    config = method.configure(config, lr=lr, updates=updates)
  else:
    train = dataclasses.replace(config.train, objective=name)
    config = dataclasses.replace(config, train=train)
  return workspace.with_config(config)


def _split(
  workspace: Workspace,
) -> tuple[list[data.Trajectory], list[data.Trajectory]]:
  """Returns the trajectories to train on and the held-out ones."""
  settings = workspace.config.data
  return data.split_by_problem(
    workspace.trajectories(), fraction=settings.held_out, seed=settings.seed
  )


def _sequences(
  workspace: Workspace,
  objective: Objective,
  trajectories: list[data.Trajectory],
  skipped: Counter[str] | None = None,
) -> Sequence[Any]:
  """Returns what the loader packs for an objective.

  Args:
    workspace: settings and codec.
    objective: makes its data of them.
    trajectories: to train on.
    skipped: takes the number of those that were left out, by kind.
  """
  train = workspace.config.train
  return objective.sequences(
    trajectories,
    lambda chosen: fitting.tokenize(
      workspace, chosen, train.granularity, skipped
    ),
    train,
  )


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
  trains=True,
  settings=("seed", "init", "model", "data", "critic", "lora", "train"),
  reads=_reads,
  leaves=_leaves,
)
