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
  raw_returns: jax.Array  # R_t before scale and offset
  returns: jax.Array  # R_t
  segment_ids: jax.Array | None  # i32

  def at_next_decision(self, x: jax.Array) -> jax.Array:
    """Takes x at the sequence's next decision point, 0 after the last."""
    shifted = jnp.roll(jnp.where(self.decisions, x, 0.0), -1, axis=1)
    # Only one position of an action carries anything: the sum is a copy.
    return segments.sums_until(
      jnp.where(self.lasts, 0.0, shifted), self.step_ends
    )

  def step_rewards(self) -> jax.Array:
    """Reward from t up to the next decision point, f32[B, T]."""
    return self.returns - self.at_next_decision(self.returns)

  def importance(self, cap: float | None) -> jax.Array:
    """Weights min(exp(D_0), cap) of the sequences, no gradient; 1 for None."""
    if cap is None:
      return jnp.ones_like(self.log_ratios)
    total = segments.segment_totals(_stop(self.log_ratios), self.segment_ids)
    # The minimum is taken of the logarithms, where nothing overflows.
    return jnp.exp(jnp.minimum(total, math.log(cap)))


def follow_paths(
  logps,
  ref_logps,
  values,
  rewards,
  action_mask,
  decision_mask,
  segment_ids,
  *,
  target_logps=None,
  clip_log=None,
  reward_scale=1.0,
  reward_offset=0.0,
) -> Paths:
  """Computes every sum along the sequences that the losses need."""
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

  def log_ratios(numerator):
    ratio = numerator.astype(jnp.float32) - _stop(ref_logps).astype(jnp.float32)
    return jnp.where(actions, ratio, 0.0)

  ratios = log_ratios(logps)
  rewards = _stop(rewards.astype(jnp.float32))
  if rewards.ndim == 2 and segment_ids is not None:
    rewards = jnp.where(segment_ids > 0, rewards, 0.0)
  # One pass for all sums: (what is summed, where the sum ends).
  sums = {"rest": (ratios, lasts), "step": (ratios, step_ends)}
  if rewards.ndim == 2:
    sums["returns"] = (rewards, lasts)
  if target_logps is not None:
    target_ratios = _stop(log_ratios(target_logps))
    sums["target_rest"] = (target_ratios, lasts)
    sums["target_step"] = (target_ratios, step_ends)
  stacked = segments.sums_until(
    jnp.stack([x for x, _ in sums.values()]),
    jnp.stack([ends for _, ends in sums.values()]),
  )
  sums = dict(zip(sums, stacked, strict=True))

  if rewards.ndim == 2:
    raw_returns = sums["returns"]
  else:
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
  rewards = rewards.astype(jnp.float32)
  if rewards.ndim == 1:
    returns = rewards[:, None]
  else:
    returns = segments.suffix_sums(rewards, segment_ids)
  first = segments.select(decision_mask, segment_ids).first
  return jnp.sum(first & (returns > 0.0), dtype=jnp.float32)


class Weights(NamedTuple):
  """Arrays f32[B, T] that turn `weighted_sum` into the means of a loss."""

  decisions: jax.Array  # over decision points
  actions: jax.Array  # over action tokens
  sequences: jax.Array  # over sequences; sits at their first decision point


def mean_over(
  action_mask,
  decision_mask,
  segment_ids,
  *,
  reduction: str,
  decision_count: Count | None,
  action_count: Count | None,
) -> Weights:
  """Computes the `Weights` of a batch, or of a part of one given counts."""
  both = segments.select(
    jnp.stack([decision_mask.astype(bool), action_mask.astype(bool)]),
    segment_ids,
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


def _check_rewards(rewards: jax.Array, shape: tuple[int, ...]) -> None:
  if rewards.shape not in (shape, shape[:1]):
    raise ValueError(
      f"rewards must be [B] or [B, T] = {shape}, got {rewards.shape}"
    )
