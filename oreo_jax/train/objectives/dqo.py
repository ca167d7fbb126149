"""DQO: soft actor-critic with the Q-function read off the policy."""

from __future__ import annotations

import jax

from oreo_jax import losses
from oreo_jax.data.packing import Batch
from oreo_jax.models import Params
from oreo_jax.train.forward import Forward
from oreo_jax.train.objective import Method, Metrics, Objective
from oreo_jax.train.objectives.batches import (
  Counts,
  all_answers,
  prepare_counts,
)
from oreo_jax.train.objectives.oreo import soft_bellman_options
from oreo_jax.train.setup import Setup


def dqo_loss(
  params: Params, out: Forward, rows: Batch, totals: Counts, setup: Setup
) -> tuple[jax.Array, Metrics]:
  """Value and policy regress to lambda-returns of the soft reward."""
  del params
  t = setup.train
  loss = losses.dqo_loss(
    out.policy.logps,
    out.ref_logps,
    out.critic,
    rows.rewards,
    rows.action_mask,
    rows.decision_mask,
    **soft_bellman_options(rows, totals, t),
    lambda_=t.dqo_lambda,
    kl=None if t.kl == "k3" else out.policy.kl,
    alpha=t.alpha,
  )
  return loss.total, loss.metrics


DQO = Objective(
  name="dqo",
  label="DQO",
  trains=("policy", "critic"),
  reads=("reference",),
  loss=dqo_loss,
  prepare=prepare_counts,
  sequences=all_answers,
  methods=(
    # Paper: OREO's beta. DQO has no KL term beside that of beta.
    Method(
      "dqo",
      "DQO",
      "green",
      "dqo",
      alpha=0.0,
      lr_scales=(0.03, 0.1, 0.3, 1.0),
    ),
  ),
)
