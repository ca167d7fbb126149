"""DQO: soft actor-critic on whole trajectories, as a baseline to OREO.

The module follows the statement of DQO (arXiv 2410.09302) that this project's
baselines share: `Q(s, a) = beta * d + V(s)` is read off the policy, value and
policy regress to lambda-returns of the soft reward `r - beta * d`, and the
policy's regression is weighed by a clipped importance weight of the
trajectory. Shapes and symbols are those of `oreo_jax.losses.oreo`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from oreo_jax.losses import segments
from oreo_jax.losses.paths import follow_paths, mean_over
from oreo_jax.losses.regression import OreoLoss, Residuals, regression_loss
from oreo_jax.losses.segments import Count

_stop = jax.lax.stop_gradient


def lambda_returns(
  soft_rewards: jax.Array,
  next_values: jax.Array,
  decisions: jax.Array,
  *,
  lambda_: float,
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Lambda-returns along the decision points of every sequence.

    G_t = soft_reward_t + (1 - lambda) * V_next + lambda * G_next

  where "next" is the next decision point of the sequence; after the last one
  V and G are 0.

  Args:
    soft_rewards: f32[B, T], read at decision points.
    next_values: f32[B, T], V at the next decision point, 0 after the last.
    decisions: bool[B, T].
    lambda_: 1 sums all soft rewards (Monte Carlo), 0 looks one step ahead.
    segment_ids: i32[B, T] or None.

  Returns:
    `(G, G_next)`, both f32[B, T] and meaningful at decision points.

  Example:
    >>> import jax.numpy as jnp
    >>> now, following = lambda_returns(
    ...   jnp.asarray([[0.0, 1.0]]), jnp.asarray([[0.5, 0.0]]),
    ...   jnp.ones((1, 2), bool), lambda_=0.5)
    >>> now.tolist(), following.tolist()
    ([[0.75, 1.0]], [[1.0, 0.0]])
  """
  lasts = segments.last_of_segment(decisions.shape, segment_ids)
  # The recurrence runs over all positions, not over decision points alone. At
  # one that is none it adds nothing and has scale 1, so that position t holds
  # the G of the next decision point at or after t. At the last position of a
  # sequence the scale is 0: nothing comes over from the neighbour in the row.
  one_step = soft_rewards + (1.0 - lambda_) * next_values
  scale = jnp.where(decisions, lambda_, 1.0)
  returns = segments.linear_recurrence(
    jnp.where(decisions, one_step, 0.0), jnp.where(lasts, 0.0, scale)
  )
  # For the same reason the G of the next decision point after t stands at
  # t + 1, however long the action is.
  next_returns = jnp.where(lasts, 0.0, jnp.roll(returns, -1, axis=1))
  return returns, next_returns


def dqo_loss(
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  rewards: jax.Array,
  action_mask: jax.Array,
  decision_mask: jax.Array,
  *,
  beta: float,
  segment_ids: jax.Array | None = None,
  lambda_: float = 1.0,
  importance_cap: float | None = math.e,
  kl: jax.Array | None = None,
  alpha: float | jax.Array = 0.0,
  reduction: str = "sequence",
  reward_scale: float = 1.0,
  reward_offset: float = 0.0,
  decision_count: Count | None = None,
  action_count: Count | None = None,
) -> OreoLoss:
  """Value and policy loss of DQO, in one differentiable sum.

    value  = mean_t (V_t - sg(G_t))^2
    policy = mean_t w * (beta * A_t + sg(V_t) - r_t - sg(G_next))^2
    total  = value + policy + alpha * mean_t kl_t

  G is the lambda-return of `r_t - beta * A_t` with bootstrap V, and
  `w = min(exp(D_0), importance_cap)` the weight of the trajectory under the
  policy against the one that sampled it, taken to be the reference. With
  `lambda_=1` and `importance_cap=None` it is the OREO loss, term for term.

  Args:
    logps: f32[B, T], log pi of the sampled tokens.
    ref_logps: f32[B, T], of the frozen reference. No gradient.
    values: f32[B, T], V of the state before the token.
    rewards: f32[B, T] per token, or f32[B], terminal reward of the row.
    action_mask: bool[B, T], tokens the policy produced.
    decision_mask: bool[B, T], where an action starts; DQO proper takes every
      token for an action: `decision_mask = action_mask`.
    beta: temperature, > 0.
    segment_ids: i32[B, T] for packed rows, or None.
    lambda_: of the lambda-return, in [0, 1].
    importance_cap: bound of w; None does not weigh.
    kl: f32[B, T] or None, as in `oreo_loss`; not part of DQO proper.
    alpha: weight of the KL, 0 for DQO proper.
    reduction: "sequence" or "token", as in `oreo_loss`.
    reward_scale: factor on rewards.
    reward_offset: added to the return of every sequence.
    decision_count: `Count` of the whole batch, as in `oreo_loss`.
    action_count: the same of `action_mask`.

  Returns:
    An `OreoLoss`, as the terms are the same; 0 with gradients of 0 for an empty
    mask. Metrics add up over parts of a batch, see `summarize_metrics`.

  Raises:
    ValueError: if shapes disagree or `reduction` is unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.ones((1, 2), bool)
    >>> loss = dqo_loss(
    ...   jnp.asarray([[-1.0, -2.0]]), jnp.asarray([[-2.0, -2.0]]),
    ...   jnp.asarray([[0.5, 0.5]]), jnp.asarray([1.0]), mask, mask, beta=0.5,
    ...   lambda_=0.0, importance_cap=None)
    >>> round(float(loss.value), 3), round(float(loss.policy), 3)
    (0.25, 0.125)

  Source: arXiv 2410.09302, section 4: the Q-function read off the policy, the
  value loss (eq. 4.6) and policy loss (eq. 4.7) on lambda-returns, the weight
  cut at e (4.3). Its abstract and secondary accounts of it were followed, not
  its text. One account weighs the value loss too; here only the policy's is.
  """
  paths = follow_paths(
    logps,
    ref_logps,
    values,
    rewards,
    action_mask,
    decision_mask,
    segment_ids=segment_ids,
    reward_scale=reward_scale,
    reward_offset=reward_offset,
  )
  values = paths.at_decisions(values)
  constant = _stop(values)
  step_rewards = paths.step_rewards()
  returns, next_returns = lambda_returns(
    step_rewards - beta * paths.target_step,
    paths.at_next_decision(constant),
    paths.decisions,
    lambda_=lambda_,
    segment_ids=segment_ids,
  )
  # Q is read off the policy as beta * A + V; it regresses to r + G_next. The
  # returns are made of constants, so that no gradient passes through them.
  q_residual = beta * paths.step + constant - step_rewards - next_returns
  return regression_loss(
    Residuals(
      value=paths.at_decisions(values - returns),
      policy=paths.at_decisions(q_residual),
      target=paths.at_decisions(returns),
      paths=paths,
    ),
    mean_over(
      paths,
      reduction=reduction,
      decision_count=decision_count,
      action_count=action_count,
    ),
    logps,
    ref_logps,
    values,
    kl=kl,
    alpha=alpha,
    value_importance=None,
    policy_importance=paths.importance(importance_cap),
  )
