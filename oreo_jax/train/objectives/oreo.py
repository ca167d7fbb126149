"""OREO, and its value network alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from oreo_jax import losses
from oreo_jax.config import TrainConfig
from oreo_jax.data.packing import Batch
from oreo_jax.models import Params
from oreo_jax.train.forward import Forward
from oreo_jax.train.objective import Method, Metrics, Objective
from oreo_jax.train.objectives.batches import (
  Counts,
  all_answers,
  prepare_counts,
)
from oreo_jax.train.setup import Setup


def oreo_loss(
  params: Params, out: Forward, rows: Batch, totals: Counts, setup: Setup
) -> tuple[jax.Array, Metrics]:
  """Value loss, policy loss and KL penalty in one sum."""
  t = setup.train
  log_alpha = params.get("log_alpha")
  loss = losses.oreo_loss(
    out.policy.logps,
    out.ref_logps,
    out.critic,
    rows.rewards,
    rows.action_mask,
    rows.decision_mask,
    **soft_bellman_options(rows, totals, t),
    kl=None if t.kl == "k3" else out.policy.kl,
    alpha=t.alpha if log_alpha is None else jnp.exp(log_alpha),
    clip_log=t.clip_log or None,
    target_logps=out.target_logps,
    importance_cap=math.e if t.importance_weights else None,
    hinge=t.hinge,
    positive_count=totals.positive,
    single_step=t.single_step,
  )
  return loss.total, loss.metrics


def value_loss(
  params: Params, out: Forward, rows: Batch, totals: Counts, setup: Setup
) -> tuple[jax.Array, Metrics]:
  """The value loss of a policy that is the reference: D_t is 0."""
  del params
  zeros = jnp.zeros_like(out.critic)
  loss = losses.oreo_loss(
    zeros,
    zeros,
    out.critic,
    rows.rewards,
    rows.action_mask,
    rows.decision_mask,
    **soft_bellman_options(rows, totals, setup.train),
    single_step=setup.train.single_step,
  )
  # Those of the policy are of a policy that is not trained.
  own = ("value/", "reward/")
  metrics = {k: v for k, v in loss.metrics.items() if k.startswith(own)}
  return loss.value, metrics


def soft_bellman_options(
  rows: Batch, totals: Counts, config: TrainConfig
) -> dict[str, Any]:
  """Returns what the losses of the soft Bellman equation share."""
  return {
    "beta": config.beta,
    "segment_ids": rows.segment_ids,
    "reduction": config.reduction,
    "reward_scale": config.reward_scale,
    "reward_offset": config.reward_offset,
    "decision_count": totals.decisions,
    "action_count": totals.actions,
  }


OREO = Objective(
  name="oreo",
  label="OREO",
  trains=("policy", "critic", "log_alpha"),
  reads=("reference", "target"),
  loss=oreo_loss,
  prepare=prepare_counts,
  sequences=all_answers,
  methods=(
    # Paper: beta 0.03; alpha 0.01, ten times as much at the step level and
    # thirty times at the response level.
    Method("oreo_token", "OREO, token", "blue", "oreo"),
    Method(
      "oreo_step",
      "OREO, step",
      "blue",
      "oreo",
      "step",
      alpha=0.1,
      lr_scales=(0.1, 0.3, 1.0, 3.0),
    ),
    Method(
      "oreo_response",
      "OREO, response",
      "blue",
      "oreo",
      "response",
      alpha=0.3,
    ),
  ),
)

VALUE = Objective(
  name="value",
  label="value alone",
  trains=("critic",),
  loss=value_loss,
  prepare=prepare_counts,
  sequences=all_answers,
)
