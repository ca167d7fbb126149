"""Folders that start where a stage of another one ended.

`iterate` and `compare` are made of them: a round starts from the policy of the
round before, a cell of the comparison from the SFT policy of its seed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from oreo_jax import data
from oreo_jax.analysis.statistics import wilson_interval
from oreo_jax.config import Config
from oreo_jax.models import Params
from oreo_jax.rollout.methods import Exam
from oreo_jax.stages.workspace import Work, Workspace


class Origin(NamedTuple):
  """Where a policy comes from."""

  workspace: Workspace
  stage: str = ""  # empty: the policy that the workspace itself starts from

  def policy(self) -> Params:
    """Reads the policy."""
    if not self.stage:
      return self.workspace.start_policy()
    return self.workspace.load_model(self.stage, "policy")[0]

  def record(self) -> pathlib.Path:
    """Returns the record that stands for the policy's content."""
    if not self.stage:
      return self.workspace.start_record()
    return self.workspace.record_path(self.stage)


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
    super().__init__(config, directory)
    self.origin = origin
    self._trajectories_of = trajectories_of
    self.__dict__["task"] = origin.workspace.task
    self.__dict__["tokenizer"] = origin.workspace.tokenizer

  def start_policy(self) -> Params:
    """Returns the policy this branch starts from, its reference."""
    return self.origin.policy()

  def start_record(self) -> pathlib.Path:
    """Returns the record of the policy this branch starts from."""
    return self.origin.record()

  def base_name(self) -> str:
    """Returns the checkpoint that adapters trained here belong to, if any."""
    return "" if self.origin.stage else self.origin.workspace.base_name()

  def trajectories(self) -> list[data.Trajectory]:
    """Reads the trajectories to train on."""
    if self._trajectories_of is None:
      return super().trajectories()
    return self._trajectories_of.trajectories()

  def trajectories_path(self) -> pathlib.Path:
    """Returns where the trajectories to train on are."""
    if self._trajectories_of is None:
      return super().trajectories_path()
    return self._trajectories_of.trajectories_path()

  def problem_count(self, split: str) -> int:
    """Returns how many problems of a split are measured on; 0: all."""
    config = self.config
    if split == config.evaluate.split:
      return config.evaluate.problems
    return config.compare.validation_problems

  def settings_of(self, work: Work) -> dict[str, Any]:
    """Returns the settings that the stage's outcome depends on."""
    settings = super().settings_of(work)
    if self.origin.stage and work.name == "train":
      settings["round_critic"] = self.config.round_critic
    if work.name in MEASURES:
      settings["measured"] = {
        "problems": self.problem_count(work.name),
        "max_new_tokens": self.config.evaluate.max_new_tokens,
      }
    return settings


def measure(branch: Branch, stage: str, split: str) -> dict[str, Any]:
  """Decodes greedily on held-out problems, once; the record is a stage's.

  Args:
    branch: gets the folder `<split>/`.
    stage: whose policy; empty for the one the branch starts from.
    split: which problems.

  Returns:
    The record: accuracy, interval, correct, total, rewards a problem.
  """
  if branch.is_done(MEASURES[split]):
    return branch.record(split)
  task = branch.need_task("a held-out accuracy needs problems")
  layout = branch.layout("lm")
  exam = Exam(
    task.problems(split, branch.problem_count(split) or None),
    task,
    branch.codec,
    layout.model,
    branch.config.evaluate,
  )
  stage_run = branch.begin(MEASURES[split])
  place = branch.directory
  with jax.set_mesh(layout.mesh):
    answers = exam.answer(
      layout.place(Origin(branch, stage).policy()),
      f"{place.parent.name}/{place.name}, {split}",
    )
  correct, total = int(answers.rewards.sum()), len(answers.rewards)
  stage_run.done(
    accuracy=correct / total,
    interval=list(wilson_interval(correct, total)),
    correct=correct,
    total=total,
    tokens_per_problem=float(answers.generation.lengths.mean()),
    rewards=answers.rewards.astype(int).tolist(),
  )
  return branch.record(split)


def _measured_records(workspace: Workspace) -> Mapping[str, pathlib.Path]:
  """Returns the record of the policy that is measured."""
  objective = workspace.config.train.objective
  return {
    "start": workspace.start_record(),
    "trained": workspace.record_path(objective),
  }


# The accuracy of one policy on a split whose answers nobody trains on; a part
# of `iterate` and `compare`. Which policy it was follows from the records.
MEASURES = {
  split: Work(split, ("task", "data", "sampling"), _measured_records)
  for split in ("validation", "test")
}
