"""Scalars worth watching, in a form that adds up over parts of a batch.

Every metric of a loss divides by the same count as the loss does. Given the
counts of the whole batch, the metrics of its parts are therefore summed, like
losses and gradients; `summarize_metrics` then derives what is no sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from oreo_jax.losses.segments import weighted_sum


def value_metrics(
  weights: jax.Array,
  values: jax.Array,
  target: jax.Array,
  residual: jax.Array,
) -> dict[str, jax.Array]:
  """First and second moments of a value, its target and their difference.

  Args:
    weights: f32[B, T], as `mean_weights` gives them.
    values: f32[B, T].
    target: f32[B, T].
    residual: f32[B, T], values - target.

  Returns:
    A dict of f32[].
  """
  return {
    "value/mean": weighted_sum(weights, values),
    "value/target": weighted_sum(weights, target),
    "value/target_square": weighted_sum(weights, jnp.square(target)),
    "value/residual": weighted_sum(weights, residual),
    "value/residual_square": weighted_sum(weights, jnp.square(residual)),
    "value/residual_abs": weighted_sum(weights, jnp.abs(residual)),
  }


def summarize_metrics(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Derives from added-up metrics what could not be added up.

    value/explained_variance = 1 - Var(residual) / Var(target)
    value/residual_rms       = sqrt(mean residual^2)
    x/chosen, x/rejected     = x/chosen_sum / count/chosen, ...      (KTO)
    rewards/margins          = rewards/chosen - rewards/rejected     (KTO)

  The variances run over the decision points of the batch, weighted as in the
  loss. A critic that predicts the mean of its target explains 0 of it, a
  perfect one 1. Entries whose ingredients are absent are left out; a quotient
  without anything to divide by is 0.

  Args:
    metrics: of any loss here, summed over all parts of the batch.

  Returns:
    A new dict: `metrics` and the derived entries.

  Example:
    >>> import jax.numpy as jnp
    >>> moments = {"value/target": 0.5, "value/target_square": 0.5,
    ...            "value/residual": 0.0, "value/residual_square": 0.0625}
    >>> moments = {k: jnp.asarray(v) for k, v in moments.items()}
    >>> float(summarize_metrics(moments)["value/explained_variance"])
    0.75
  """
  derived = {}
  if "value/residual_square" in metrics:
    target = _variance(metrics, "value/target")
    residual = _variance(metrics, "value/residual")
    derived["value/explained_variance"] = jnp.where(
      target > 0.0, 1.0 - _divide(residual, target), 0.0
    )
    derived["value/residual_rms"] = jnp.sqrt(metrics["value/residual_square"])
  if "count/chosen" in metrics:
    for side in ("chosen", "rejected"):
      for name in ("rewards", "logps"):
        derived[f"{name}/{side}"] = _divide(
          metrics[f"{name}/{side}_sum"], metrics[f"count/{side}"]
        )
    derived["rewards/margins"] = (
      derived["rewards/chosen"] - derived["rewards/rejected"]
    )
  return {**metrics, **derived}


def _variance(metrics: dict[str, jax.Array], name: str) -> jax.Array:
  square = metrics[f"{name}_square"] - jnp.square(metrics[name])
  # Rounding can leave a small negative number where the variance is 0.
  return jnp.maximum(square, 0.0)


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  safe = jnp.where(denominator > 0.0, denominator, 1.0)
  return jnp.where(denominator > 0.0, numerator / safe, 0.0)
