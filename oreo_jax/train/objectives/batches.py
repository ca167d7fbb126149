"""What several objectives have in common: counts, selections of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from oreo_jax import losses
from oreo_jax.config import TrainConfig
from oreo_jax.data import Tokenized, Trajectory
from oreo_jax.data.packing import Batch
from oreo_jax.models import Params
from oreo_jax.train.objective import Rows
from oreo_jax.train.setup import Setup

Tokenize = Callable[[Sequence[Trajectory]], list[Tokenized]]


class Counts(NamedTuple):
  """Selected tokens and sequences of the whole batch."""

  actions: losses.Count
  decisions: losses.Count
  positive: jax.Array  # f32[], sequences of positive reward


def count_batch(batch: Batch) -> Counts:
  """Counts what the means over a whole batch are divided by."""
  return Counts(
    actions=losses.count_mask(batch.action_mask, batch.segment_ids),
    decisions=losses.count_mask(batch.decision_mask, batch.segment_ids),
    positive=losses.count_positive(
      batch.rewards, batch.decision_mask, batch.segment_ids
    ),
  )


def prepare_counts(
  params: Params, ref: Params | None, batch: Batch, setup: Setup
) -> Rows:
  """Leaves the batch as it is; its totals are `Counts`."""
  del params, ref, setup
  return Rows(batch, count_batch(batch))


def all_answers(
  trajectories: Sequence[Trajectory], tokenize: Tokenize, config: TrainConfig
) -> list[Tokenized]:
  """Learns from every answer, right or wrong."""
  del config
  return tokenize(trajectories)


def sum_answers(
  per_token: jax.Array, rows: Batch, setup: Setup
) -> losses.SequenceLogps:
  """Sums an array [B, T] over the tokens of each answer: [B, S]."""
  return losses.sequence_logps(
    per_token,
    rows.action_mask,
    segment_ids=rows.segment_ids,
    num_segments=setup.max_segments or None,
  )
