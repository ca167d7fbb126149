"""Imitation: of demonstrations (SFT), or of right answers (rejection)."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from oreo_jax import losses
from oreo_jax.config import SftConfig, TrainConfig
from oreo_jax.data import Tokenized, Trajectory, construct
from oreo_jax.data.packing import Batch
from oreo_jax.models import Params
from oreo_jax.train.forward import Forward
from oreo_jax.train.objective import Method, Metrics, Objective, Rows
from oreo_jax.train.objectives.batches import (
  Counts,
  Tokenize,
  all_answers,
  prepare_counts,
)
from oreo_jax.train.setup import Setup


def negative_log_likelihood(
  params: Params, out: Forward, rows: Batch, totals: Counts, setup: Setup
) -> tuple[jax.Array, Metrics]:
  """Mean negative log-likelihood of the response tokens."""
  del params, setup
  loss = losses.sft_loss(
    out.policy.logps,
    rows.action_mask,
    segment_ids=rows.segment_ids,
    action_count=totals.actions,
  )
  return loss, {"policy/nll": loss}


def prepare_text(
  params: Params, ref: Params | None, batch: Batch, setup: Setup
) -> Rows:
  """Learns prompts too if `on_prompts` says so, as pre-training does."""
  stage = setup.stage
  if isinstance(stage, SftConfig) and stage.on_prompts:
    batch = batch._replace(action_mask=batch.segment_ids > 0)
  return prepare_counts(params, ref, batch, setup)


def right_answers(
  trajectories: Sequence[Trajectory], tokenize: Tokenize, config: TrainConfig
) -> list[Tokenized]:
  """Learns from the answers that solve their problem."""
  del config
  return tokenize(construct.select_correct(trajectories))


SFT = Objective(
  name="sft",
  label="SFT",
  trains=("policy",),
  loss=negative_log_likelihood,
  prepare=prepare_text,
  sequences=all_answers,
  section="sft",
)

REJECTION = Objective(
  name="rejection",
  label="rejection sampling",
  trains=("policy",),
  loss=negative_log_likelihood,
  prepare=prepare_counts,
  sequences=right_answers,
  methods=(
    # Paper: the rate of OREO. Neither beta nor alpha is read.
    Method(
      "rejection",
      "Rejection sampling",
      "orange",
      "rejection",
      lr_scales=(0.3, 1.0, 3.0, 10.0),
    ),
  ),
)
