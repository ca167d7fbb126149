"""How good the value network is: AUC, calibration, values along an answer.

Accuracy of a value is judged *within* a problem: does a right answer get a
higher value than a wrong answer to the same problem? The pooled AUC mostly
measures which problems are easy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from oreo_jax.analysis.auc import pooled_auc, within_problem_auc
from oreo_jax.analysis.statistics import calibration_bins

TENTHS = np.arange(1, 11) / 10


def value_aucs(
  scores: np.ndarray, labels: np.ndarray, problems: Sequence[str]
) -> dict[str, float]:
  """Returns pooled and within-problem AUC (nan where a class is missing)."""
  if labels.all() or not labels.any():
    return {"heldout/pooled_auc": np.nan, "heldout/within_problem_auc": np.nan}
  return {
    "heldout/pooled_auc": float(pooled_auc(scores, labels)),
    "heldout/within_problem_auc": float(
      within_problem_auc(scores, labels, problems).auc
    ),
  }


def analyse(
  along: np.ndarray,
  states: np.ndarray,
  rewards: np.ndarray,
  problems: Sequence[str],
  *,
  trained: np.ndarray | None = None,
  seed: int = 0,
  reward_scale: float = 1.0,
  reward_offset: float = 0.0,
) -> dict[str, Any]:
  """Describes values along graded answers, at every tenth of their length.

  A value learns `reward_scale * reward + reward_offset`. Means, histograms and
  calibration undo this and are in units of the rewards.

  Args:
    along: f32[R, S], V after 0, 1, ... tokens of each answer.
    states: i32[R], index of the last state that counts.
    rewards: f32[R], as graded; above 1/2 is right.
    problems: the problem of each answer.
    trained: bool[R, S], the states whose value the critic was trained at; each
      tenth is read at the latest of them. By default every state is one.
    seed: of the bootstrap.
    reward_scale: factor with which the value was trained.
    reward_offset: offset with which the value was trained.

  Returns:
    What stands under `values` in results.json.
  """
  labels = rewards > 0.5
  columns = np.rint(states[:, None] * TENTHS[None]).astype(int)
  if trained is not None:
    index = np.where(trained, np.arange(along.shape[1])[None], 0)
    latest = np.maximum.accumulate(index, axis=1)
    columns = np.take_along_axis(latest, columns, axis=1)
  read = np.take_along_axis(along, columns, axis=1)  # [R, 10]
  # Ranks do not change with the scale, and so the AUC is of the values as they
  # were trained: rounding could make ties of them.
  within = [
    within_problem_auc(column, labels, problems, seed=seed) for column in read.T
  ]
  pooled = [pooled_auc(column, labels) for column in read.T]
  values = (read - reward_offset) / reward_scale
  edges = np.linspace(
    min(0.0, float(values.min())), max(1.0, float(values.max())), 31
  )

  def counts(rows):
    return [np.histogram(column, edges)[0].tolist() for column in rows.T]

  bins = calibration_bins(values[:, -1], rewards, bins=10)
  return {
    "answers": len(labels),
    "tenths": TENTHS.tolist(),
    "within_problem_auc": [result.auc for result in within],
    "within_problem_auc_interval": [list(result.interval) for result in within],
    "mixed_problems": within[-1].problems,
    "pooled_auc": pooled,
    "mean_correct": values[labels].mean(axis=0).tolist(),
    "mean_wrong": values[~labels].mean(axis=0).tolist(),
    "histogram": {
      "edges": edges.tolist(),
      "correct": counts(values[labels]),
      "wrong": counts(values[~labels]),
    },
    "calibration": {
      "predicted": bins.predicted.tolist(),
      "observed": bins.observed.tolist(),
      "count": bins.counts.tolist(),
    },
  }
