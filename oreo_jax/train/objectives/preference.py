"""DPO: pairs of a right and a wrong answer to one problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from oreo_jax import losses
from oreo_jax.config import TrainConfig
from oreo_jax.data import Tokenized, Trajectory, construct
from oreo_jax.data.packing import Batch
from oreo_jax.models import Params
from oreo_jax.train.forward import Forward
from oreo_jax.train.objective import Method, Metrics, Objective, Rows
from oreo_jax.train.objectives.batches import (
  Tokenize,
  count_batch,
  sum_answers,
)
from oreo_jax.train.setup import Setup


def dpo_loss(
  params: Params, out: Forward, rows: Batch, totals: jax.Array, setup: Setup
) -> tuple[jax.Array, Metrics]:
  """Pairs stand side by side in a row: segments 2k - 1 and 2k.

  Args:
    params: not read.
    out: what the networks say.
    rows: a micro-batch.
    totals: f32[], pairs of the whole batch.
    setup: the stage's fixed part.
  """
  del params
  t = setup.train
  policy = sum_answers(out.policy.logps, rows, setup)
  reference = sum_answers(out.ref_logps, rows, setup)
  chosen, rejected = losses.split_pairs(policy.logps)
  ref_chosen, ref_rejected = losses.split_pairs(reference.logps)
  loss = losses.dpo_loss(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    beta=t.beta,
    loss_type=t.dpo_variant,
    label_smoothing=t.label_smoothing,
    mask=losses.split_pairs(policy.lengths)[0] > 0,
    num_pairs=totals,
  )
  return loss.total, loss.metrics


def prepare_pairs(
  params: Params, ref: Params | None, batch: Batch, setup: Setup
) -> Rows:
  """Counts the pairs of the whole batch."""
  del params, ref, setup
  return Rows(batch, count_batch(batch).actions.sequences / 2.0)


def answer_pairs(
  trajectories: Sequence[Trajectory], tokenize: Tokenize, config: TrainConfig
) -> list[tuple[Tokenized, Tokenized]]:
  """Pairs answers to the same problem, the better one first."""
  pairs = construct.preference_pairs(
    trajectories, max_pairs=config.pairs, seed=config.seed
  )
  # `tokenize` may drop answers that are too long. Every side gets an id of its
  # own, so that an answer that is dropped takes its pair with it.
  sides = [
    dataclasses.replace(side, id=f"{side.id} #{index}")
    for index, side in enumerate(side for pair in pairs for side in pair)
  ]
  tokenized = {sequence.id: sequence for sequence in tokenize(sides)}
  return [
    (tokenized[chosen.id], tokenized[rejected.id])
    for chosen, rejected in zip(sides[::2], sides[1::2], strict=True)
    if chosen.id in tokenized and rejected.id in tokenized
  ]


DPO = Objective(
  name="dpo",
  label="DPO",
  trains=("policy",),
  reads=("reference",),
  loss=dpo_loss,
  prepare=prepare_pairs,
  sequences=answer_pairs,
  group_size=2,
  methods=(
    # Paper: beta 0.1 and a tenth of OREO's rate.
    Method(
      "dpo",
      "DPO",
      "purple",
      "dpo",
      beta=0.1,
      alpha=0.0,
      lr_scale=0.1,
      lr_scales=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    ),
  ),
)
