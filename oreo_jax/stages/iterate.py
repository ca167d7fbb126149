"""Rounds of collecting and training: iterative OREO (paper, figure 2).

Round k samples with the policy of round k - 1 and trains it further, with that
policy as the reference. Every round has a folder of its own:

sft/                       the policy that round 1 starts from
round<k>/config.py         its settings
round<k>/collect/          its trajectories
round<k>/<objective>/      what it trained, with its curves
round<k>/<split>/          accuracy on held-out problems; round 0 is the start
round<last>/results.json   search and values of the last round, as `evaluate`
rounds.json                the table

Any objective can be iterated, rejection sampling too. A run that was cut off
goes on where it was.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
from absl import logging

from oreo_jax import train
from oreo_jax.analysis.statistics import wilson_interval
from oreo_jax.config import Config, ConfigError
from oreo_jax.files import write_json
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.stages import pipeline
from oreo_jax.stages.bench import Bench
from oreo_jax.stages.evaluate import evaluate
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train.checkpoint import Checkpoints
from oreo_jax.train.objectives import OBJECTIVES

# Between the seeds of two rounds: more than anyone repeats a run.
_SEED_STRIDE = 1000

# Stages that `measure` makes: splits whose answers nobody trains on.
_MEASURED = ("validation", "test")


class Origin(NamedTuple):
  """Where a policy comes from."""

  workspace: Workspace
  stage: str = ""  # empty: the policy that the workspace itself starts from

  def policy(self) -> Params:
    """Reads the policy."""
    if not self.stage:
      return self.workspace.start_policy()
    return self.workspace.load_model(self.stage)[0]["policy"]

  def __str__(self) -> str:
    """Names it; the records hold this."""
    stage = self.stage or "start"
    if isinstance(self.workspace, Branch):
      return f"{self.workspace.directory.name}/{stage}"
    return stage  # the name of the whole run's directory may change


class Branch(Workspace):
  """A work directory that starts where a stage of another one ended.

  Its starting policy, and so its reference, is that stage's. Tokenizer and
  task are the other one's.
  """

  def __init__(
    self,
    config: Config,
    directory: str | pathlib.Path,
    origin: Origin,
    *,
    trajectories_of: Workspace | None = None,
  ):
    """Opens the directory.

    Args:
      config: settings of this branch.
      directory: where its stages go.
      origin: where its policy comes from.
      trajectories_of: whose trajectories it trains on; its own by default.
    """
    self.origin = origin
    self._trajectories_of = trajectories_of
    super().__init__(config, directory)
    self.task = origin.workspace.task

  def _open_tokenizer(self, config: Config):
    del config
    return self.origin.workspace.tokenizer

  def start_policy(self) -> Params:
    """Returns the policy this branch starts from, its reference."""
    return self.origin.policy()

  def trajectories(self):
    """Reads the trajectories to train on."""
    if self._trajectories_of is None:
      return super().trajectories()
    return self._trajectories_of.trajectories()

  def problem_count(self, split: str) -> int:
    """Returns how many problems of a split are measured on; 0: all."""
    config = self.config
    if split == config.evaluate.split:
      return config.evaluate.problems
    return config.compare.validation_problems

  def settings_of(self, stage: str) -> dict[str, Any]:
    """Returns the settings that the stage's outcome depends on."""
    settings = super().settings_of("train" if stage in _MEASURED else stage)
    settings["origin"] = str(self.origin)
    if self.origin.stage and stage != "collect":
      settings["round_critic"] = self.config.round_critic
    if stage in _MEASURED:
      settings["measured"] = {
        "problems": self.problem_count(stage),
        "max_new_tokens": self.config.evaluate.max_new_tokens,
      }
    return settings


def iterate(workspace: Workspace) -> dict[str, Any]:
  """Runs `config.rounds` rounds; returns what it wrote to `rounds.json`.

  Raises:
    ConfigError: without a task, or with settings that rounds cannot have.
  """
  config = workspace.config
  check_rounds(workspace, config.rounds)
  objective = config.train.objective
  if objective == "value":
    raise ConfigError(
      "config.train.objective=value leaves the policy as it is, so rounds of "
      "it lead nowhere: set --config.train.objective=oreo"
    )
  pipeline.sft(workspace)
  split = config.evaluate.split
  enabled = workspace.is_chief
  with Progress(config.rounds, "rounds", unit="round", enabled=enabled) as bar:
    start = Branch(config, workspace.directory / "round0", Origin(workspace))
    rows = [_row(0, measure(start, "", split))]
    last = None
    for number in range(1, config.rounds + 1):
      directory = workspace.directory / f"round{number}"
      origin = Origin(last, objective) if last else Origin(workspace)
      last = Branch(round_config(config, number), directory, origin)
      rows.append(play_round(last, number))
      bar.update(accuracy=rows[-1]["accuracy"])
  evaluate(last)
  results = {
    "task": workspace.task.name,
    "objective": objective,
    "split": split,
    "critic": config.round_critic,
    "problems": config.round_problems,
    "rounds": rows,
  }
  if workspace.is_chief:
    write_json(workspace.directory / "rounds.json", results)
  return results


def check_rounds(workspace: Workspace, rounds: int) -> None:
  """Raises a ConfigError before anything runs that could not end."""
  config = workspace.config
  if workspace.task is None:
    raise ConfigError(
      "rounds need problems to collect on: set --config.task.name"
    )
  if config.round_critic == "continue" and config.critic.kind != "separate":
    raise ConfigError(
      f"config.round_critic=continue needs a value network of its own, not "
      f"critic.kind={config.critic.kind!r}: set --config.critic.kind=separate "
      "or --config.round_critic=fresh"
    )
  if config.round_problems == "fresh":
    last = round_config(config, rounds).collect
    want = last.skip + last.problems
    found = len(workspace.task.problems("train", want))
    if found < want:
      raise ConfigError(
        f"{rounds} rounds of fresh problems need {want} training problems and "
        f"the task has {found}: lower --config.collect.problems or the number "
        "of rounds, or set --config.round_problems=same"
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
  pipeline.collect(branch)
  if config.round_critic == "continue" and OBJECTIVES[objective].needs_critic:
    _continue_critic(branch)
  pipeline.train_objective(branch, objective)
  figures = measure(branch, objective, config.evaluate.split)
  collected, trained = branch.record("collect"), branch.record(objective)
  return _row(number, figures) | {
    "success": collected["success"],
    "trajectories": trained["trajectories"],
    "steps": trained["steps"],
    "seconds": round(collected["seconds"] + trained["seconds"], 1),
  }


def measure(branch: Branch, stage: str, split: str) -> dict[str, Any]:
  """Decodes greedily on held-out problems, once; the record is a stage's.

  Args:
    branch: gets the folder `<split>/`.
    stage: whose policy; empty for the one the branch starts from.
    split: which problems.

  Returns:
    The record: accuracy, interval, correct, total, rewards a problem.
  """
  if not branch.is_done(split):
    problems = branch.task.problems(split, branch.problem_count(split) or None)
    run = branch.begin(split)
    policy = Origin(branch, stage).policy()
    place = branch.directory
    description = f"{place.parent.name}/{place.name}, {split}"
    rewards, _, answers, _ = Bench(branch, problems).sample(
      policy, description=description
    )
    correct, total = int(rewards.sum()), len(rewards)
    run.done(
      accuracy=correct / total,
      interval=list(wilson_interval(correct, total)),
      correct=correct,
      total=total,
      tokens_per_problem=float(answers.lengths.mean()),
      rewards=rewards.astype(int).tolist(),
    )
  return branch.record(split)


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
    roles, _ = origin.workspace.load_model(origin.stage)
    setup = train.make_setup(config, OBJECTIVES[objective], num_steps=1)

    def fresh(base, critic):
      key = jax.random.key(config.seed)
      return train.init_state(key, setup, base, critic)

    abstract = jax.eval_shape(fresh, roles["policy"], roles["critic"])
    shardings = train.state_shardings(setup, abstract, branch.mesh)
    state = jax.jit(fresh, out_shardings=shardings)(
      roles["policy"], roles["critic"]
    )
    checkpoints.save(0, state)
  return None


def _row(number: int, figures: dict[str, Any]) -> dict[str, Any]:
  kept = ("accuracy", "interval", "correct", "total")
  return {"round": number} | {key: figures[key] for key in kept}
