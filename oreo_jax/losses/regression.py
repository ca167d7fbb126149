"""From residuals to a loss: what OREO and DQO have in common.

Both regress a value and a policy, and both may add a KL penalty. They differ in
their residuals alone; how these are weighed, averaged and reported is here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax.losses import segments
from oreo_jax.losses.kl import mean_kl_penalty
from oreo_jax.losses.metrics import value_metrics
from oreo_jax.losses.paths import Paths, Weights
from oreo_jax.losses.segments import weighted_sum

_stop = jax.lax.stop_gradient


class Residuals(NamedTuple):
  """What the soft Bellman equation is off by at the decision points.

  The arrays are f32[B, T] and hold 0 where no action starts.
  """

  value: jax.Array  # V - target; its gradient reaches `values` alone
  policy: jax.Array  # its gradient reaches `logps` alone
  target: jax.Array  # what the value regresses to; no gradient
  paths: Paths  # the sums along the sequences that they were made from


class OreoLoss(NamedTuple):
  """The loss and its terms, scalars of float32."""

  total: jax.Array  # value + policy + alpha * kl
  value: jax.Array  # its gradient reaches `values` alone
  policy: jax.Array  # with the hinge; its gradient reaches `logps` alone
  kl: jax.Array  # mean KL over action tokens, not yet times alpha
  metrics: dict[str, jax.Array]  # no gradient


def regression_loss(
  residuals: Residuals,
  means: Weights,
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  *,
  kl: jax.Array | None,
  alpha: float | jax.Array,
  value_importance: jax.Array | None,
  policy_importance: jax.Array | None,
  policy_penalty: float | jax.Array = 0.0,
) -> OreoLoss:
  """Mean squares of the residuals, the KL penalty, and the metrics of both.

    value  = mean_t w * residual_t^2
    policy = mean_t w * residual_t^2 + policy_penalty
    total  = value + policy + alpha * mean_t kl_t

  Args:
    residuals: of the value and of the policy.
    means: weights of the means, from `mean_over`.
    logps: f32[B, T], log pi of the sampled tokens.
    ref_logps: f32[B, T], of the frozen reference.
    values: f32[B, T].
    kl: f32[B, T], KL per token, or None for `kl_k3` of the sampled tokens.
    alpha: weight of the KL. No gradient.
    value_importance: f32[B, T], w of the value loss, or None for 1.
    policy_importance: f32[B, T], w of the policy loss, or None for 1.
    policy_penalty: f32[], a further term of the policy loss.

  Returns:
    An `OreoLoss`. Every metric divides by the count that its loss divides by,
    so that metrics of the parts of a batch add up.

  Raises:
    ValueError: if the shape of `kl` is not that of `logps`.
  """
  segments.check_shapes(logps=logps, kl=kl)
  paths = residuals.paths
  value = _mean_square(means.decisions, residuals.value, value_importance)
  policy = policy_penalty + _mean_square(
    means.decisions, residuals.policy, policy_importance
  )
  mean_kl = mean_kl_penalty(kl, logps, ref_logps, paths.actions, means.actions)
  total = value + policy + _stop(alpha) * mean_kl
  metrics = {
    **value_metrics(means.decisions, values, residuals.target, residuals.value),
    "value/loss": value,
    "value/start": weighted_sum(means.sequences, values),
    "policy/loss": policy,
    "policy/residual_abs": weighted_sum(
      means.decisions, jnp.abs(residuals.policy)
    ),
    "policy/log_ratio": weighted_sum(means.sequences, paths.rest),
    "policy/logp": weighted_sum(means.actions, logps),
    "policy/kl": mean_kl,
    "reward/mean": weighted_sum(means.sequences, paths.raw_returns),
  }
  if policy_importance is not None:
    metrics["policy/importance"] = weighted_sum(
      means.sequences, policy_importance
    )
  return OreoLoss(total, value, policy, mean_kl, _stop(metrics))


def _mean_square(
  weights: jax.Array, residual: jax.Array, importance: jax.Array | None
) -> jax.Array:
  square = jnp.square(residual)
  if importance is not None:
    square = importance * square
  return weighted_sum(weights, square)
