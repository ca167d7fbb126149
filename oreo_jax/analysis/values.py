"""How good the value network is: AUC, calibration, values along an answer.

Accuracy of a value is judged *within* a problem: does a right answer get a
higher value than a wrong answer to the same problem? The pooled AUC mostly
measures which problems are easy.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from oreo_jax import data
from oreo_jax.analysis.auc import pooled_auc, within_problem_auc
from oreo_jax.analysis.statistics import calibration_bins
from oreo_jax.config import Config
from oreo_jax.hosts import to_host
from oreo_jax.models import Params
from oreo_jax.sharding import (
  batch_sharding,
  batch_shards,
  replicated,
  shard_whole_batch,
)
from oreo_jax.train.forward import forward
from oreo_jax.train.setup import Setup
from oreo_jax.train.state import TrainState

TENTHS = np.arange(1, 11) / 10


def held_out_values(
  sequences: Sequence[data.Tokenized],
  setup: Setup,
  config: Config,
  mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Params], dict[str, float]]:
  """Makes a function that judges a value network on unseen problems.

  Args:
    sequences: tokenised trajectories of held-out problems.
    setup: the training stage.
    config: row length and batch size are read.
    mesh: the device mesh.

  Returns:
    (state, base) -> metrics: value AUC, pooled and within a problem, of the
    state before the last token of the answer. It raises FloatingPointError
    when a value is not finite.
  """
  size = max(config.train.batch_size // config.train.grad_accum, 1)
  size = -(-size // batch_shards(mesh)) * batch_shards(mesh)
  loader = data.make_loader(
    sequences,
    batch_size=size,
    row_length=config.data.row_length,
    shuffle=False,
    on_long="skip",
  )

  @functools.partial(
    jax.jit,
    in_shardings=(None, None, batch_sharding(mesh)),
    out_shardings=replicated(mesh),
  )
  def score(params, base, batch) -> jax.Array | None:
    return forward(params, None, base, batch, setup).values

  def measure(state: TrainState, base: Params) -> dict[str, float]:
    last, index = [], []
    for step in range(loader.num_steps):
      batch = loader.batch(step)
      rows = shard_whole_batch(batch, mesh)
      values = to_host(score(state.params, base, rows))
      members = loader.sequence_indices(step)
      for member, along in answers_of(batch, members, values):
        # V of the state before the last token: the end-of-sequence, where the
        # answer has one.
        last.append(along[-1])
        index.append(member)
    scores = np.array(last)
    if not np.isfinite(scores).all():
      raise FloatingPointError("a value of a held-out answer is not finite")
    answers = [sequences[i] for i in index]
    return value_aucs(
      scores,
      np.array([s.rewards.sum() > 0.5 for s in answers]),
      [s.problem for s in answers],
    )

  return measure


def answers_of(
  batch: data.Batch, members: np.ndarray, *arrays: np.ndarray
) -> Iterator[tuple[Any, ...]]:
  """Yields (sequence, *parts): what arrays [B, T] say of its action tokens.

  Args:
    batch: packed rows.
    members: of `loader.sequence_indices`: which sequence each segment is.
    *arrays: [B, T], aligned with the batch.
  """
  for row, segments in enumerate(members):
    for segment, member in enumerate(segments, start=1):
      if member >= 0:
        inside = batch.segment_ids[row] == segment
        inside &= batch.action_mask[row]
        yield (int(member), *(array[row][inside] for array in arrays))


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
    seed: of the bootstrap.
    reward_scale: factor with which the value was trained.
    reward_offset: offset with which the value was trained.

  Returns:
    The `values` part of results.json.
  """
  labels = rewards > 0.5
  columns = np.rint(states[:, None] * TENTHS[None]).astype(int)
  trained = np.take_along_axis(along, columns, axis=1)  # [R, 10]
  # Ranks do not change with the scale, and so the AUC is of the values as they
  # were trained: rounding could make ties of them.
  within = [
    within_problem_auc(column, labels, problems, seed=seed)
    for column in trained.T
  ]
  pooled = [pooled_auc(column, labels) for column in trained.T]
  values = (trained - reward_offset) / reward_scale
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
      "count": bins.count.tolist(),
    },
  }
