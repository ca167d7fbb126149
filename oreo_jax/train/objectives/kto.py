"""KTO: answers that are desirable or not, without pairs."""

from __future__ import annotations

from typing import NamedTuple

import jax

from oreo_jax import losses
from oreo_jax.data.loader import Loader
from oreo_jax.data.packing import Batch
from oreo_jax.models import Params
from oreo_jax.sharding import constrain_batch, micro_batches
from oreo_jax.train.forward import TRUNK, Forward, forward
from oreo_jax.train.objective import Method, Metrics, Objective, Rows
from oreo_jax.train.objectives.batches import (
  all_answers,
  count_batch,
  sum_answers,
)
from oreo_jax.train.setup import Setup


class KtoBatch(NamedTuple):
  """Answers, and the same prompts with the answers rotated by one."""

  rows: Batch
  mismatched: Batch


class KtoTotals(NamedTuple):
  """What KTO has to know of the whole batch."""

  z0: jax.Array  # f32[], the reference point
  answers: jax.Array  # f32[], their number


def kto_loss(
  params: Params, out: Forward, rows: Batch, totals: KtoTotals, setup: Setup
) -> tuple[jax.Array, Metrics]:
  """Answers of reward above one half are desirable."""
  del params
  t = setup.train
  policy = sum_answers(out.policy.logps, rows, setup)
  loss = losses.kto_loss(
    policy.logps,
    sum_answers(out.ref_logps, rows, setup).logps,
    sum_answers(rows.rewards, rows, setup).logps > 0.5,
    totals.z0,
    beta=t.beta,
    desirable_weight=t.desirable_weight,
    undesirable_weight=t.undesirable_weight,
    mask=policy.lengths > 0,
    num_sequences=totals.answers,
  )
  return loss.total, loss.metrics


def prepare_reference_point(
  params: Params, ref: Params | None, batch: KtoBatch, setup: Setup
) -> Rows:
  """Estimates the KL on the mismatched answers of the whole batch.

  All micro-batches share this one reference point, so that it does not matter
  into how many of them the batch is divided.
  """

  def sides(micro: Batch) -> tuple[losses.SequenceLogps, losses.SequenceLogps]:
    micro = jax.tree.map(constrain_batch, micro)
    out = forward(params, None, ref, micro, setup)
    return (
      sum_answers(out.policy.logps, micro, setup),
      sum_answers(out.ref_logps, micro, setup),
    )

  micro = micro_batches(batch.mismatched, setup.stage.grad_accum)
  policy, reference = jax.lax.map(sides, micro)
  z0 = losses.kto_z0(policy.logps, reference.logps, mask=policy.lengths > 0)
  answers = count_batch(batch.rows).actions.sequences
  return Rows(batch.rows, KtoTotals(z0, answers))


def mismatched_batch(loader: Loader, step: int) -> KtoBatch:
  """Returns a step's batch, and its prompts with others' answers."""
  mismatched = loader.mismatched(step)
  # The trunk has read each answer after its own prompt: it runs on these.
  extras = {k: v for k, v in mismatched.extras.items() if k != TRUNK}
  return KtoBatch(loader.batch(step), mismatched._replace(extras=extras))


KTO = Objective(
  name="kto",
  label="KTO",
  trains=("policy",),
  reads=("reference",),
  loss=kto_loss,
  prepare=prepare_reference_point,
  sequences=all_answers,
  batch=mismatched_batch,
  extra_forwards=1,
  methods=(
    # Paper: a hundredth of OREO's rate; beta 0.1 is KTO's own default.
    Method(
      "kto",
      "KTO",
      "purple",
      "kto",
      beta=0.1,
      alpha=0.0,
      lr_scale=0.01,
      lr_scales=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    ),
  ),
)
