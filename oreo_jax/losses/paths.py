"""Sums along the sequences of a batch, shared by OREO and DQO.

Names and shapes are those of `oreo_jax.losses.oreo`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax.losses import segments
from oreo_jax.losses.segments import Count

_stop = jax.lax.stop_gradient


class Paths(NamedTuple):
  """Quantities of the telescoped soft Bellman equation, [B, T]."""

  actions: jax.Array  # bool, action tokens
  decisions: jax.Array  # bool, decision points
  lasts: jax.Array  # bool, last position of a sequence
  step_ends: jax.Array  # bool, last position of an action
  log_ratios: jax.Array  # d_t, carries gradient
  step: jax.Array  # A_t, carries gradient
  rest: jax.Array  # D_t of the policy, carries gradient
  target_step: jax.Array  # A_t for the value loss, no gradient
  target_rest: jax.Array  # D_t for the value loss (EMA, clipped), no gradient
  raw_returns: jax.Array  # R_t before scale and offset, no gradient
  returns: jax.Array  # R_t, no gradient
  segment_ids: jax.Array | None  # i32

  def at_decisions(self, x: jax.Array) -> jax.Array:
    """Takes x where an action starts and 0 elsewhere, f32[B, T].

    What is left out may be anything, NaN too, and gets a gradient of 0.
    """
    return jnp.where(self.decisions, x.astype(jnp.float32), 0.0)

  def at_next_decision(self, x: jax.Array) -> jax.Array:
    """Takes x at the sequence's next decision point, 0 after the last."""
    # Move every entry one place to the left, so that the next decision point's
    # lies inside the own action; at a sequence's last place it would come from
    # the neighbour in the row, and is dropped.
    shifted = jnp.roll(self.at_decisions(x), -1, axis=1)
    shifted = jnp.where(self.lasts, 0.0, shifted)
    # Within an action only its last place holds anything now, so the sum to
    # the end of the action carries a copy of it back to where it starts.
    return segments.sums_until(shifted, self.step_ends)

  def step_rewards(self) -> jax.Array:
    """Sums the reward from t up to the next decision point, f32[B, T]."""
    return self.returns - self.at_next_decision(self.returns)

  def importance(self, cap: float | None) -> jax.Array | None:
    """Weighs every sequence by min(exp(D_0), cap), with no gradient.

    Args:
      cap: the bound, or None not to weigh.

    Returns:
      f32[B, T], one number a sequence, or None.
    """
    if cap is None:
      return None
    total = segments.segment_totals(_stop(self.log_ratios), self.segment_ids)
    # The minimum is taken of the logarithms, where nothing overflows.
    return jnp.exp(jnp.minimum(total, math.log(cap)))


def follow_paths(
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  rewards: jax.Array,
  action_mask: jax.Array,
  decision_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  target_logps: jax.Array | None = None,
  clip_log: float | None = None,
  reward_scale: float | jax.Array = 1.0,
  reward_offset: float | jax.Array = 0.0,
) -> Paths:
  """Computes every sum along the sequences that the losses need.

  Args:
    logps: as in `soft_bellman_residuals`, like all other arguments.
    ref_logps: no gradient.
    values: read for its shape alone.
    rewards: f32[B] or f32[B, T].
    action_mask: bool[B, T].
    decision_mask: bool[B, T].
    segment_ids: i32[B, T] or None.
    target_logps: f32[B, T] or None. No gradient.
    clip_log: bound of |D_t| in the value loss.
    reward_scale: factor on rewards.
    reward_offset: added to the return of every sequence.

  Returns:
    The `Paths` of the batch.

  Raises:
    ValueError: if shapes disagree.
  """
  segments.check_shapes(
    logps=logps,
    ref_logps=ref_logps,
    values=values,
    action_mask=action_mask,
    decision_mask=decision_mask,
    segment_ids=segment_ids,
    target_logps=target_logps,
  )
  _check_rewards(rewards, logps.shape)
  actions = action_mask.astype(bool)
  decisions = decision_mask.astype(bool)
  lasts = segments.last_of_segment(logps.shape, segment_ids)
  # An action ends where its sequence does or where the next one starts.
  step_ends = lasts | jnp.roll(decisions, -1, axis=1)

  def log_ratios(numerator: jax.Array) -> jax.Array:
    # Policy and reference differ by little: subtract them in float32.
    ratio = numerator.astype(jnp.float32) - _stop(ref_logps).astype(jnp.float32)
    return jnp.where(actions, ratio, 0.0)

  ratios = log_ratios(logps)
  rewards = _stop(rewards.astype(jnp.float32))
  if rewards.ndim == 2 and segment_ids is not None:
    rewards = jnp.where(segment_ids > 0, rewards, 0.0)

  # The sums differ in what they add and in where they end. Each costs log2(T)
  # passes over the batch, so all are stacked and take their passes together.
  summands = {"rest": (ratios, lasts), "step": (ratios, step_ends)}
  if rewards.ndim == 2:
    summands["returns"] = (rewards, lasts)
  if target_logps is not None:
    target_ratios = _stop(log_ratios(target_logps))
    summands["target_rest"] = (target_ratios, lasts)
    summands["target_step"] = (target_ratios, step_ends)
  stacked = segments.sums_until(
    jnp.stack([x for x, _ in summands.values()]),
    jnp.stack([ends for _, ends in summands.values()]),
  )
  sums = dict(zip(summands, stacked, strict=True))

  if rewards.ndim == 2:
    raw_returns = sums["returns"]
  else:
    # A terminal reward is still to come at every position of the row.
    raw_returns = jnp.broadcast_to(rewards[:, None], ratios.shape)
  target_rest = _stop(sums.get("target_rest", sums["rest"]))
  if clip_log is not None:
    target_rest = jnp.clip(target_rest, -clip_log, clip_log)
  return Paths(
    actions=actions,
    decisions=decisions,
    lasts=lasts,
    step_ends=step_ends,
    log_ratios=ratios,
    step=sums["step"],
    rest=sums["rest"],
    target_step=_stop(sums.get("target_step", sums["step"])),
    target_rest=target_rest,
    raw_returns=raw_returns,
    returns=raw_returns * reward_scale + reward_offset,
    segment_ids=segment_ids,
  )


class Weights(NamedTuple):
  """Arrays f32[B, T] that turn `weighted_sum` into the means of a loss."""

  decisions: jax.Array  # over decision points
  actions: jax.Array  # over action tokens
  sequences: jax.Array  # over sequences; sits at their first decision point


def mean_over(
  paths: Paths,
  *,
  reduction: str,
  decision_count: Count | None = None,
  action_count: Count | None = None,
) -> Weights:
  """Computes the weights of the means over a batch.

  Args:
    paths: of these rows.
    reduction: "sequence" or "token", as in `mean_weights`.
    decision_count: `count_mask` of the whole batch's decision points, where
      these rows are one part of it; None counts those of `paths`.
    action_count: the same of its action tokens.

  Returns:
    A `Weights`.

  Raises:
    ValueError: for any other reduction.
  """
  # Both masks fall on the same sequences: stacked, they take one pass.
  both = segments.select(
    jnp.stack([paths.decisions, paths.actions]), paths.segment_ids
  )
  decisions = segments.Selection(*(x[0] for x in both))
  actions = segments.Selection(*(x[1] for x in both))
  decision_count = decision_count or decisions.count()
  action_count = action_count or actions.count()
  per_sequence = 1.0 / jnp.maximum(decision_count.sequences, 1.0)
  return Weights(
    decisions=segments.mean_weights(
      decisions, decision_count, reduction=reduction
    ),
    actions=segments.mean_weights(actions, action_count, reduction=reduction),
    sequences=jnp.where(decisions.first, per_sequence, 0.0),
  )


def count_positive(
  rewards: jax.Array,
  decision_mask: jax.Array,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Counts the sequences of positive reward, over which the hinge is a mean.

  A sequence counts if the sum of its rewards from its first decision point on,
  before any scale and offset, is above 0. One without a decision point does
  not count.

  Args:
    rewards: f32[B, T] per token, or f32[B], terminal reward of the row.
    decision_mask: bool[B, T], where an action starts.
    segment_ids: i32[B, T] or None.

  Returns:
    f32[]; counts of the parts of a batch add up.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> rewards = jnp.asarray([[0.0, 1.0, -1.0, 0.0]])
    >>> ids = jnp.asarray([[1, 1, 2, 2]])
    >>> float(count_positive(rewards, jnp.ones((1, 4), bool), ids))
    1.0
  """
  segments.check_shapes(decision_mask=decision_mask, segment_ids=segment_ids)
  _check_rewards(rewards, decision_mask.shape)
  if rewards.ndim == 2:
    returns = segments.suffix_sums(rewards, segment_ids)
  else:
    returns = rewards[:, None]
  first = segments.select(decision_mask, segment_ids).first
  return jnp.sum(first & (returns > 0.0), dtype=jnp.float32)


def mean_shortfall(
  paths: Paths, means: Weights, positive_count: jax.Array | None
) -> jax.Array:
  """Averages max(0, -D_0) over the sequences of positive reward: the hinge.

  Args:
    paths: of these rows.
    means: of these rows.
    positive_count: f32[], `count_positive` of the whole batch, where these rows
      are one part of it; None counts those of `paths`.

  Returns:
    f32[], 0 if no sequence is positive.
  """
  positive = (means.sequences > 0.0) & (paths.raw_returns > 0.0)
  if positive_count is None:
    positive_count = positive.sum(dtype=jnp.float32)
  weights = jnp.where(positive, 1.0 / jnp.maximum(positive_count, 1.0), 0.0)
  return segments.weighted_sum(weights, jax.nn.relu(-paths.rest))


def _check_rewards(rewards: jax.Array, shape: tuple[int, ...]) -> None:
  if rewards.shape not in (shape, shape[:1]):
    raise ValueError(
      f"rewards must be [B] or [B, T] = {shape}, got {rewards.shape}"
    )
