"""`oreo evaluate`: every method on the same held-out problems.

Leaves `results.json` in the work directory: accuracy with 95% intervals, what
each method cost, how good the values are, and one worked example. A run on a
file of trajectories, without a task, has no problems to answer: there the value
is judged on the trajectories of held-out problems.
"""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from oreo_jax import data, decode, files, report, scoring
from oreo_jax.analysis import values
from oreo_jax.analysis.auc import compare_scores
from oreo_jax.analysis.results import (
  RESULTS_NAME,
  Evaluation,
  checked,
  read_results,
)
from oreo_jax.analysis.statistics import wilson_interval
from oreo_jax.config import Config, ConfigError
from oreo_jax.models import Params
from oreo_jax.rollout import methods
from oreo_jax.rollout.example import worked_example
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import RECORD, Workspace, changed_sources
from oreo_jax.train import OBJECTIVES

# Scores of recorded trajectories; the others are compared with the first.
VALUE, START = "value, last state", "value, before the answer"
LENGTH, LOGP = "length, shorter first", "mean log-probability, base policy"


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
  return _evaluate_task(workspace, path)


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


def _evaluate_task(workspace: Workspace, path: pathlib.Path) -> Evaluation:
  """Has every trained policy answer held-out problems."""
  config, task = workspace.config, workspace.task
  settings = config.evaluate
  stages = trained_stages(config, workspace)
  if not stages:
    raise ConfigError(f"no trained model in {workspace.directory}: train first")
  exam = methods.Exam(
    task.problems(settings.split, settings.problems or None),
    task,
    workspace.codec,
    config.model,
    settings,
  )
  stage_run = workspace.begin(EVALUATE)
  graded_before = Counter(task.grading_report())
  rows: list[dict[str, Any]] = []
  judged: dict[str, Any] = {}
  for stage in stages:
    roles = workspace.roles(stage)
    label = OBJECTIVES[stage].label
    # The objective `value` leaves the policy as it was.
    policy = (
      workspace.load_model(stage, "policy")[0]
      if "policy" in roles
      else workspace.start_policy()
    )
    outcomes = methods.plain_methods(policy, label, exam)
    if "critic" in roles:
      granularity = _granularity(workspace, stage)
      critic = workspace.load_model(stage, "critic")[0]
      if granularity == "response":
        logging.warning(
          "%s: a response-level value network was trained at the prompt alone, "
          "so answers are not ranked by it: train with "
          "--config.train.granularity=token or step",
          stage,
        )
        outcomes += methods.sampled_methods(policy, None, label, exam)
      else:
        judge = methods.Judge(
          critic,
          granularity,
          config.train.reward_scale,
          config.train.reward_offset,
        )
        outcomes += methods.sampled_methods(policy, judge, label, exam)
        outcomes += methods.beam_methods(policy, judge, label, exam)
        if stage == config.train.objective:
          judged = _judge_values(workspace, exam, policy, judge)
    rows += [_row(outcome, stage) for outcome in outcomes]
  timings = _timings(workspace, ("sft", "collect", *stages))
  results = {
    "task": task.name,
    "seed": config.seed,
    "problems": len(exam.problems),
    "objective": config.train.objective,
    "methods": rows,
    "grading": dict(Counter(task.grading_report()) - graded_before),
    **judged,
    "timings": timings | {"evaluate": stage_run.seconds},
  }
  written = checked(results, Evaluation)
  if workspace.is_chief:
    files.write_json(path, written)
  stage_run.done(methods=len(rows))
  return written


def _granularity(workspace: Workspace, stage: str) -> str:
  """Returns the granularity that a stage's value network was trained at."""
  return workspace.record(stage)["settings"]["train"]["granularity"]


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
  scale, offset = config.train.reward_scale, config.train.reward_offset
  example = worked_example(
    policy,
    workspace.start_policy(),
    few.problems[first],
    generation.answers()[row],
    (along[row] - offset) / scale,
    float(answers.rewards[row]),
    workspace.codec,
    config.model,
    workspace.mesh,
    beta=config.train.beta / scale,
  )
  return {"values": analysis, "example": example}


def _evaluate_trajectories(
  workspace: Workspace, path: pathlib.Path
) -> Evaluation:
  """Judges the value on the recorded trajectories of held-out problems.

  The value is compared with what costs nothing: the length of the answer and
  its mean log-probability under the base policy.
  """
  config = workspace.config
  objective = config.train.objective
  if "critic" not in workspace.roles(objective):
    raise ConfigError(
      f"config.train.objective={objective!r} trains no value, and without a "
      "task nothing else can be judged: set --config.train.objective=oreo or "
      "value, or --config.task.name"
    )
  granularity = _granularity(workspace, objective)
  if granularity == "response":
    raise ConfigError(
      "a response-level value network was trained at the prompt alone, so it "
      "cannot tell two answers to one problem apart: train with "
      "--config.train.granularity=token or step"
    )
  _, held = data.split_by_problem(
    workspace.trajectories(),
    fraction=config.data.held_out,
    seed=config.data.seed,
  )
  sequences = workspace.codec.tokenize(
    held, granularity=granularity, on_error=config.data.on_error
  )
  rewards = np.array([s.rewards.sum() for s in sequences])
  labels = rewards > 0.5
  if labels.all() or not labels.any():
    raise ConfigError(
      f"of {len(labels)} held-out trajectories {labels.sum()} are right, so "
      "that there is nothing to tell apart: raise --config.data.held_out"
    )
  stage_run = workspace.begin(EVALUATE)
  along, logps = score_trajectories(workspace, sequences, objective)
  trained = [s.decision_mask[s.action_mask] for s in sequences]
  latest = [
    row[np.flatnonzero(at)[-1]] for row, at in zip(along, trained, strict=True)
  ]
  problems = [sequence.problem for sequence in sequences]
  seed = config.evaluate.seed
  results = {
    "task": "trajectories",
    "seed": config.seed,
    "problems": len(set(problems)),
    "methods": [],
    "values": values.analyse(
      _padded(along),
      np.array([len(row) - 1 for row in along]),
      rewards,
      problems,
      trained=_padded(trained).astype(bool),
      seed=seed,
      reward_scale=config.train.reward_scale,
      reward_offset=config.train.reward_offset,
    ),
    "value_scores": compare_scores(
      {
        VALUE: np.array(latest),
        START: _mean_by_problem([row[0] for row in along], problems),
        LENGTH: np.array([-float(len(row)) for row in along]),
        LOGP: np.array([row.mean() for row in logps]),
      },
      labels,
      problems,
      seed=seed,
    ),
    "timings": _timings(workspace, (objective,))
    | {"evaluate": stage_run.seconds},
  }
  written = checked(results, Evaluation)
  if workspace.is_chief:
    files.write_json(path, written)
  stage_run.done(trajectories=len(labels), problems=written["problems"])
  return written


def score_trajectories(
  workspace: Workspace, sequences: Sequence[data.Tokenized], objective: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Runs value network and base policy over trajectories.

  Returns:
    For every sequence f32[action tokens]: V of the state before each token,
    and its log-probability under the policy that training started from.
  """
  train = workspace.config.train
  critic, model = workspace.load_model(objective, "critic")
  networks = {
    "values": (scoring.value_network(model), critic),
    "logps": (
      scoring.policy_logps(model, train.loss_chunk),
      workspace.start_policy(),
    ),
  }
  scores = []
  for name, (network, params) in networks.items():
    scorer = scoring.Scorer(
      sequences,
      network,
      workspace.mesh,
      row_length=workspace.config.data.row_length,
      batch_size=train.batch_size // train.grad_accum,
      description=name,
    )
    scores.append([score[name] for score in scorer(params)])
  return scores[0], scores[1]


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
  """Returns f32[R, longest]: ragged rows with zeros behind them."""
  longest = max(len(row) for row in rows)
  table = np.zeros((len(rows), longest), np.float32)
  for line, row in zip(table, rows, strict=True):
    line[: len(row)] = row
  return table


def _mean_by_problem(
  scores: Sequence[float], problems: Sequence[str]
) -> np.ndarray:
  """Returns each problem's mean: what differs within it is rounding."""
  _, group = np.unique(np.asarray(problems), return_inverse=True)
  means = np.bincount(group, scores) / np.bincount(group)
  return means[group]


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
  settings=("task", "data", "evaluate"),
  reads=_reads,
  leaves=lambda config: ("evaluate", "results.json", "report.html"),
)
