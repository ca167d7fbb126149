"""One round of collecting and training, for `iterate` and `compare`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from absl import logging

from oreo_jax import train
from oreo_jax.config import Config, ConfigError
from oreo_jax.stages.branch import Branch, measure
from oreo_jax.stages.collect import collect
from oreo_jax.stages.train import train_objective
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train.checkpoint import Checkpoints
from oreo_jax.train.objectives import OBJECTIVES

# Between the seeds of two rounds: more than anyone repeats a run.
_SEED_STRIDE = 1000


def check_rounds(workspace: Workspace, rounds: int) -> None:
  """Raises a ConfigError before anything runs that could not end."""
  config = workspace.config
  task = workspace.need_task("rounds need problems to collect on")
  if config.round_critic == "continue" and config.critic.kind != "separate":
    raise ConfigError(
      f"config.round_critic=continue needs a value network of its own, not "
      f"critic.kind={config.critic.kind!r}: set --config.critic.kind=separate "
      "or --config.round_critic=fresh"
    )
  if config.round_problems == "fresh":
    last = round_config(config, rounds).collect
    want = last.skip + last.problems
    available = len(task.problems("train", want))
    if available < want:
      raise ConfigError(
        f"{rounds} rounds of fresh problems need {want} training problems and "
        f"the task has {available}: lower --config.collect.problems or the "
        "number of rounds, or set --config.round_problems=same"
      )


def round_config(config: Config, number: int) -> Config:
  """Returns the settings of a round: fresh draws, perhaps fresh problems.

  Args:
    config: the settings of round 1.
    number: of the round, from 1.

  Returns:
    With seeds of its own for sampling and for the order of the data. With
    `round_problems=fresh`, `collect.skip` moves on by `collect.problems` a
    round; otherwise all rounds sample the same problems.
  """
  shift = _SEED_STRIDE * (number - 1)
  skip = config.collect.skip
  if config.round_problems == "fresh":
    if not config.collect.problems:
      raise ConfigError(
        "config.collect.problems=0 leaves no fresh problems for a next round: "
        "set --config.collect.problems, or --config.round_problems=same"
      )
    skip += (number - 1) * config.collect.problems
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, path=""),
    collect=dataclasses.replace(
      config.collect, skip=skip, seed=config.collect.seed + shift
    ),
    train=dataclasses.replace(config.train, seed=config.train.seed + shift),
  )


def play_round(branch: Branch, number: int) -> dict[str, Any]:
  """Collects, trains and measures; returns a row of the table."""
  config = branch.config
  objective = config.train.objective
  collect(branch)
  if config.round_critic == "continue" and OBJECTIVES[objective].needs_critic:
    _continue_critic(branch)
  train_objective(branch)
  figures = measure(branch, objective, config.evaluate.split)
  collected, trained = branch.record("collect"), branch.record(objective)
  return round_row(number, figures) | {
    "success": collected["success"],
    "trajectories": trained["trajectories"],
    "steps": trained["steps"],
    "seconds": round(collected["seconds"] + trained["seconds"], 1),
  }


def _continue_critic(branch: Branch) -> None:
  """Lets training begin with the value network of the round before.

  Training resumes from the newest checkpoint of its folder: one of step 0
  holds a state that is fresh but for the critic. The values of the round
  before are those of its soft-optimal policy under its reference; the
  reference has moved since, which is why to begin afresh is the default.
  """
  origin, config = branch.origin, branch.config
  if not origin.stage:
    return logging.info("the first round has no critic to go on with")
  objective = config.train.objective
  with Checkpoints(branch.path(objective) / "checkpoints") as checkpoints:
    if checkpoints.latest_step() is not None:
      return None
    policy = origin.policy()
    critic = origin.workspace.load_model(origin.stage, "critic")[0]
    setup = train.make_setup(config, OBJECTIVES[objective], num_steps=1)

    def fresh(base, critic):
      key = jax.random.key(config.seed)
      return train.init_state(key, setup, base, critic)

    abstract = jax.eval_shape(fresh, policy, critic)
    shardings = train.state_shardings(setup, abstract, branch.mesh)
    state = jax.jit(fresh, out_shardings=shardings)(policy, critic)
    checkpoints.save(0, state)
  return None


def round_row(number: int, figures: dict[str, Any]) -> dict[str, Any]:
  """Returns a row of the table of rounds: what was measured."""
  names = ("accuracy", "interval", "correct", "total")
  return {"round": number} | {name: figures[name] for name in names}
