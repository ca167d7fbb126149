"""What the value says of recorded trajectories of problems it never saw.

For runs on a file, without a task: nothing can be sampled and graded, but the
held-out trajectories have their labels. The value is compared with what costs
nothing, the length of the answer and its mean log-probability under the base
policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from oreo_jax import data, scoring
from oreo_jax.analysis import values
from oreo_jax.analysis.auc import compare_scores
from oreo_jax.config import ConfigError
from oreo_jax.stages.workspace import Workspace

# Names of the scores; the first is what the others are compared with.
VALUE, START = "value, last state", "value, before the answer"
LENGTH, LOGP = "length, shorter first", "mean log-probability, base policy"


def held_out_sequences(
  workspace: Workspace, objective: str, granularity: str
) -> list[data.Tokenized]:
  """Returns the trajectories of held-out problems, in tokens.

  Raises:
    ConfigError: if there is nothing that could be judged on them.
  """
  config = workspace.config
  if "critic" not in workspace.roles(objective):
    raise ConfigError(
      f"config.train.objective={objective!r} trains no value, and without a "
      "task nothing else can be judged: set --config.train.objective=oreo or "
      "value, or --config.task.name"
    )
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
  labels = np.array([s.rewards.sum() > 0.5 for s in sequences], bool)
  if labels.all() or not labels.any():
    raise ConfigError(
      f"of {len(labels)} held-out trajectories {labels.sum()} are right, so "
      "that there is nothing to tell apart: raise --config.data.held_out"
    )
  return sequences


def judge_trajectories(
  workspace: Workspace, sequences: Sequence[data.Tokenized], objective: str
) -> dict[str, Any]:
  """Returns the figures of `results.json`, but for its timings."""
  config = workspace.config
  rewards = np.array([s.rewards.sum() for s in sequences])
  along, logps = score_trajectories(workspace, sequences, objective)
  trained = [s.decision_mask[s.action_mask] for s in sequences]
  latest = [
    row[np.flatnonzero(at)[-1]] for row, at in zip(along, trained, strict=True)
  ]
  problems = [sequence.problem for sequence in sequences]
  seed = config.evaluate.seed
  return {
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
      rewards > 0.5,
      problems,
      seed=seed,
    ),
  }


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
      scoring.policy_logps(model, train.loss_chunk, train.loss_vocab_chunk),
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
