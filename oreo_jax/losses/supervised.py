"""Supervised fine-tuning: the likelihood of the demonstrated tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from oreo_jax.losses import segments
from oreo_jax.losses.segments import Count


def sft_loss(
  logps: jax.Array,
  action_mask: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  action_count: Count | None = None,
) -> jax.Array:
  """Mean negative log-likelihood of the response tokens.

    loss = -mean_t logps_t over action tokens

  On trajectories of reward 1 it is rejection sampling (STaR, RAFT). All tokens
  count alike, in whichever sequence of a row they stand.

  Args:
    logps: f32[B, T], log-probabilities of the tokens.
    action_mask: bool[B, T], response tokens.
    segment_ids: i32[B, T] for packed rows, or None; padding (0) never counts.
    action_count: `count_mask(action_mask)` of the whole batch where these
      arrays are one part of it; the parts' losses then add up.

  Returns:
    f32[]; 0 with gradients of 0 for an empty mask.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> logps = jnp.asarray([[-1.0, -3.0, -9.0]])
    >>> float(sft_loss(logps, jnp.asarray([[True, True, False]])))
    2.0
  """
  segments.check_shapes(
    logps=logps, action_mask=action_mask, segment_ids=segment_ids
  )
  mask = action_mask.astype(bool)
  if segment_ids is not None:
    mask = mask & (segment_ids > 0)
  if action_count is None:
    tokens = mask.sum(dtype=jnp.float32)
  else:
    tokens = action_count.tokens
  weights = jnp.where(mask, 1.0 / jnp.maximum(tokens, 1.0), 0.0)
  return -segments.weighted_sum(weights, logps)
