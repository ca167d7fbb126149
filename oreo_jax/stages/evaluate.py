"""`oreo evaluate`: every method on the same held-out problems.

Leaves `results.json` in the work directory: accuracy with 95% intervals, what
each method cost, how good the values are, and one worked example. A run on a
file of trajectories, without a task, has no problems to answer: there the value
is judged on the trajectories of held-out problems.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from oreo_jax import decode, files, report
from oreo_jax.analysis import values
from oreo_jax.analysis.results import (
  RESULTS_NAME,
  Evaluation,
  checked,
  read_results,
)
from oreo_jax.analysis.statistics import wilson_interval
from oreo_jax.config import Config, ConfigError
from oreo_jax.decode.layout import Layout
from oreo_jax.models import Params
from oreo_jax.rollout import Player, agent_methods, grading_counts, methods
from oreo_jax.rollout.example import worked_example
from oreo_jax.stages.records import RECORD, changed_sources
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.trajectories import (
  held_out_sequences,
  judge_trajectories,
)
from oreo_jax.stages.workspace import Workspace
from oreo_jax.tasks import Task
from oreo_jax.tasks.environment import AgentTask
from oreo_jax.train import OBJECTIVES


def run(workspace: Workspace, say: Say) -> None:
  """Evaluates what is trained, and says the table."""
  results = evaluate(workspace)
  if workspace.is_chief:
    say(report.format_table(results))


def evaluate(workspace: Workspace) -> Evaluation:
  """Runs the evaluation; returns what it wrote to `results.json`.

  Results that were made from other models than those here now are made again.
  """
  path = workspace.directory / RESULTS_NAME
  if path.exists() and _is_current(workspace):
    return read_results(workspace.directory)
  if workspace.task is None:
    return _evaluate_trajectories(workspace, path)
  return _evaluate_task(workspace, workspace.task, path)


def trained_stages(config: Config, workspace: Workspace) -> list[str]:
  """Returns the trained stages to compare that have ended, SFT first."""
  names = ("sft", *config.baselines, config.train.objective)
  return [
    name
    for name in dict.fromkeys(names)
    if workspace.record_path(name).exists()
  ]


def _is_current(workspace: Workspace) -> bool:
  """Returns whether the results are of the models and settings of now."""
  record = workspace.path("evaluate") / RECORD
  if not record.exists():
    return False
  sources = changed_sources(
    files.read_json(record), workspace.made_from(EVALUATE)
  )
  if sources:
    logging.info(
      "evaluating again: %s changed since the last time", ", ".join(sources)
    )
    return False
  return workspace.is_done(EVALUATE)


def _evaluate_task(
  workspace: Workspace, task: Task, path: pathlib.Path
) -> Evaluation:
  """Has every trained policy answer held-out problems."""
  config = workspace.config
  settings = config.evaluate
  stages = trained_stages(config, workspace)
  if not stages:
    raise ConfigError(f"no trained model in {workspace.directory}: train first")
  layout = workspace.layout("lm", "value")
  exam = methods.Exam(
    task.problems(settings.split, settings.problems or None),
    task,
    workspace.codec,
    layout.model,
    settings,
  )
  stage_run = workspace.begin(EVALUATE)
  graded_before = grading_counts(task)
  rows: list[dict[str, Any]] = []
  judged: dict[str, Any] = {}
  for stage in stages:
    with jax.set_mesh(layout.mesh):
      outcomes, analysis = _examine(workspace, exam, layout, stage)
    rows += [_row(outcome, stage) for outcome in outcomes]
    judged |= analysis
  timings = _timings(workspace, ("sft", "collect", *stages))
  results = {
    "task": task.name,
    "seed": config.seed,
    "problems": len(exam.problems),
    "objective": config.train.objective,
    "methods": rows,
    "grading": dict(grading_counts(task) - graded_before),
    **judged,
    "timings": timings | {"evaluate": stage_run.seconds},
  }
  written = checked(results, Evaluation)
  if workspace.is_chief:
    files.write_json(path, written)
  stage_run.done(methods=len(rows))
  return written


def _examine(
  workspace: Workspace, exam: methods.Exam, layout: Layout, stage: str
) -> tuple[list[methods.Outcome], dict[str, Any]]:
  """Has the policy of a stage answer, and its value network choose.

  Returns:
    The outcomes, and what the values are worth if the stage is the objective's.
  """
  roles, label = workspace.roles(stage), OBJECTIVES[stage].label
  # The objective `value` leaves the policy as it was.
  policy = layout.place(
    workspace.load_model(stage, "policy")[0]
    if "policy" in roles
    else workspace.start_policy()
  )
  judge = None
  if "critic" in roles:
    judge = _judge(workspace, layout, stage, policy)
  if isinstance(exam.task, AgentTask):
    settings = exam.settings
    player = Player(
      policy,
      exam.config,
      exam.codec,
      exam.task,
      workspace.config.agent,
      settings.seed,
      settings.batch_size,
      exam.sampler,
      judge=judge,
    )
    return agent_methods(player, label, exam.problems, settings), {}
  outcomes = methods.plain_methods(policy, label, exam)
  if "critic" not in roles:
    return outcomes, {}
  outcomes += methods.sampled_methods(policy, judge, label, exam)
  if judge is None:
    return outcomes, {}
  outcomes += methods.beam_methods(policy, judge, label, exam)
  if stage != workspace.config.train.objective:
    return outcomes, {}
  return outcomes, _judge_values(workspace, exam, layout, policy, judge)


def _judge(
  workspace: Workspace, layout: Layout, stage: str, policy: Params
) -> methods.Judge | None:
  """Returns a stage's value network, None where it cannot rank answers.

  It holds no layers of its own where they are the policy's.
  """
  trained = workspace.record(stage)["settings"]["train"]
  if trained["granularity"] == "response":
    logging.warning(
      "%s: a response-level value network was trained at the prompt alone, "
      "so answers are not ranked by it: train with "
      "--config.train.granularity=token or step",
      stage,
    )
    return None
  return methods.Judge(
    layout.place(workspace.load_model(stage, "critic")[0], beside=policy),
    trained["granularity"],
    trained["reward_scale"],
    trained["reward_offset"],
  )


def _row(outcome: methods.Outcome, stage: str) -> dict[str, Any]:
  correct, total = int(outcome.rewards.sum()), len(outcome.rewards)
  return {
    "name": outcome.label,
    "policy": stage,
    "label": OBJECTIVES[stage].label,
    "colour": OBJECTIVES[stage].colour,
    "search": outcome.search,
    "budget": outcome.budget,
    "accuracy": correct / total,
    "interval": list(wilson_interval(correct, total)),
    "correct": correct,
    "total": total,
    "tokens_per_problem": outcome.tokens,
    "seconds": outcome.seconds,
    "rewards": outcome.rewards.astype(int).tolist(),
  }


def _timings(workspace: Workspace, stages: Sequence[str]) -> dict[str, float]:
  """Returns the seconds of the installation and of the stages before."""
  install = os.environ.get("OREO_INSTALL_SECONDS")
  timings = {"install": float(install)} if install else {}
  return timings | {
    stage: workspace.record(stage)["seconds"]
    for stage in dict.fromkeys(stages)
    if workspace.record_path(stage).exists()
  }


def _judge_values(
  workspace: Workspace,
  exam: methods.Exam,
  layout: Layout,
  policy: Params,
  judge: methods.Judge,
) -> dict[str, Any]:
  """Reads values along right and wrong samples, and one of them by steps."""
  config, settings = workspace.config, exam.settings
  few = exam._replace(problems=exam.problems[: settings.value_problems or None])
  answers = few.answer(
    policy,
    "values",
    num_samples=settings.value_samples,
    sampler=few.sampler,
  )
  generation = answers.generation
  along = decode.values_all(
    judge.critic,
    few.codec.prompts(few.problems),
    generation,
    few.config,
    batch_size=settings.batch_size,
  )
  states = generation.lengths - generation.finished
  trained = decode.readable_states(
    generation, granularity=judge.granularity, stops=few.codec.stops
  )
  analysis = values.analyse(
    along,
    states,
    answers.rewards,
    answers.problem_ids,
    trained=trained,
    seed=settings.seed,
    reward_scale=judge.reward_scale,
    reward_offset=judge.reward_offset,
  )
  # The longest wrong answer to the first problem that was also solved: where
  # the value falls says where it went wrong.
  table = answers.table(answers.rewards)
  mixed = np.flatnonzero((table.max(axis=1) > 0) & (table.min(axis=1) == 0))
  if not len(mixed):
    return {"values": analysis, "example": None}
  first = int(mixed[0])
  wrong = np.flatnonzero(table[first] == 0) + first * settings.value_samples
  row = int(wrong[np.argmax(states[wrong])])
  # A value and an advantage learn scaled rewards; the page shows them in units
  # of the reward beside it.
  scale, offset = judge.reward_scale, judge.reward_offset
  example = worked_example(
    policy,
    layout.place(workspace.start_policy()),
    few.problems[first],
    generation.answers()[row],
    (along[row] - offset) / scale,
    float(answers.rewards[row]),
    workspace.codec,
    few.config,
    layout.mesh,
    beta=config.train.beta / scale,
  )
  return {"values": analysis, "example": example}


def _evaluate_trajectories(
  workspace: Workspace, path: pathlib.Path
) -> Evaluation:
  """Judges the value on the recorded trajectories of held-out problems."""
  objective = workspace.config.train.objective
  trained = workspace.record(objective)["settings"]["train"]
  granularity = trained["granularity"]
  sequences = held_out_sequences(workspace, objective, granularity)
  stage_run = workspace.begin(EVALUATE)
  results = judge_trajectories(workspace, sequences, objective)
  timings = _timings(workspace, (objective,)) | {"evaluate": stage_run.seconds}
  written = checked(results | {"timings": timings}, Evaluation)
  if workspace.is_chief:
    files.write_json(path, written)
  stage_run.done(trajectories=len(sequences), problems=written["problems"])
  return written


def _reads(workspace: Workspace) -> dict[str, pathlib.Path]:
  """Returns the records of all models that are compared."""
  config = workspace.given_config
  names = trained_stages(config, workspace)
  paths = {name: workspace.record_path(name) for name in names}
  if workspace.given_config.task.name == "":
    paths["trajectories"] = workspace.trajectories_path()
  return paths


EVALUATE = Stage(
  name="evaluate",
  summary="compares every method on held-out problems",
  run=run,
  settings=("task", "agent", "data", "evaluate", "sampling"),
  reads=_reads,
  leaves=lambda config: ("evaluate", "results.json", "report.html"),
)
