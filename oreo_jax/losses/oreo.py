"""The OREO objective: soft Bellman consistency for policy and value at once.

Shapes, for every function: arrays are `[B, T]` and aligned on the predicted
token, i.e. index t speaks of the token `x[t+1]` given the prefix `x[..t]`.
`segment_ids` packs several sequences into a row (0 is padding); every sum runs
within one sequence. All arithmetic is float32.

One definition covers every granularity. With

  d_t = (logps_t - ref_logps_t) * action_mask_t
  D_t = sum of d from t to the end of the sequence
  A_t = sum of d from t up to, not including, the next decision point
  R_t = sum of rewards from t to the end of the sequence

`decision_mask = action_mask` is the token level, the first token of every
reasoning step the step level, the first response token the response level
(where A = D). Tokens between actions (observations) have d = 0 and are simply
passed over. Derivations and the place of every stop-gradient: docs/maths.md.

Source: arXiv 2412.16145, eq. 7-9.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from oreo_jax.losses.paths import follow_paths, mean_over, mean_shortfall
from oreo_jax.losses.regression import OreoLoss, Residuals, regression_loss
from oreo_jax.losses.segments import Count, weighted_sum

_stop = jax.lax.stop_gradient


def soft_bellman_residuals(
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  rewards: jax.Array,
  action_mask: jax.Array,
  decision_mask: jax.Array,
  *,
  beta: float,
  segment_ids: jax.Array | None = None,
  clip_log: float | None = None,
  target_logps: jax.Array | None = None,
  single_step: bool = False,
  reward_scale: float = 1.0,
  reward_offset: float = 0.0,
) -> Residuals:
  """What value and policy are off by; both losses are their mean squares.

    value_t  = V_t - (R_t - beta * sg(D_t))                             (eq. 8)
    policy_t = sg(V_t) - R_t + beta * (A_t + sg(D_t - A_t))             (eq. 9)

  `sg` stops the gradient. Both are the same number, and 0 at the optimum; they
  differ in what their gradients reach: `values` alone, and the log-probability
  of the own action alone.

  Args:
    logps: f32[B, T], log pi of the sampled tokens.
    ref_logps: f32[B, T], of the frozen reference. No gradient.
    values: f32[B, T], V of the state before the token.
    rewards: f32[B, T], reward per token, or f32[B], terminal reward of the row
      (of each of its sequences, if the row is packed).
    action_mask: bool[B, T], tokens the policy produced.
    decision_mask: bool[B, T], where an action starts; see the module's text.
    beta: temperature of the soft Bellman equation, > 0.
    segment_ids: i32[B, T] for packed rows, or None.
    clip_log: bounds |D_t| in the value's residual; None does not.
    target_logps: f32[B, T], log-probabilities of an averaged (EMA) policy that
      take the place of `logps` in the value's residual. No gradient.
    single_step: the residual over one action instead of the rest of the
      sequence, `V_t - r_t - sg(V_next) + beta * A_t`; r_t is the reward up to
      the next decision point, V_next the value there (0 after the last).
      `clip_log` does not apply to it.
    reward_scale: factor on rewards.
    reward_offset: added to the return of every sequence, as if to its terminal
      reward: `R_t = reward_scale * R_t + reward_offset`.

  Returns:
    `Residuals` of f32[B, T], 0 where no action starts.

  Raises:
    ValueError: if shapes disagree.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.ones((1, 2), bool)
    >>> off = soft_bellman_residuals(
    ...   jnp.asarray([[-1.0, -2.0]]), jnp.asarray([[-2.0, -2.0]]),
    ...   jnp.asarray([[0.5, 0.5]]), jnp.asarray([1.0]), mask, mask, beta=0.5)
    >>> off.value.tolist(), off.policy.tolist(), off.target.tolist()
    ([[0.0, -0.5]], [[0.0, -0.5]], [[0.5, 1.0]])

  Source: arXiv 2412.16145, eq. 7-9; options from its official code.
  """
  paths = follow_paths(
    logps,
    ref_logps,
    values,
    rewards,
    action_mask,
    decision_mask,
    segment_ids=segment_ids,
    target_logps=target_logps,
    clip_log=clip_log,
    reward_scale=reward_scale,
    reward_offset=reward_offset,
  )
  values = paths.at_decisions(values)
  if single_step:
    gain = paths.step_rewards() + paths.at_next_decision(_stop(values))
    target_log_ratio, log_ratio = paths.target_step, paths.step
  else:
    gain = paths.returns
    target_log_ratio = paths.target_rest
    # The number is D_t, but its gradient is that of A_t: later actions are
    # judged by their own residuals, not by this one.
    log_ratio = paths.step + _stop(paths.rest - paths.step)

  target = gain - beta * target_log_ratio
  value_residual = values - target
  policy_residual = _stop(values) - gain + beta * log_ratio

  return Residuals(
    value=paths.at_decisions(value_residual),
    policy=paths.at_decisions(policy_residual),
    target=paths.at_decisions(target),
    paths=paths,
  )


def oreo_loss(
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  rewards: jax.Array,
  action_mask: jax.Array,
  decision_mask: jax.Array,
  *,
  beta: float,
  segment_ids: jax.Array | None = None,
  kl: jax.Array | None = None,
  alpha: float | jax.Array = 0.0,
  clip_log: float | None = None,
  target_logps: jax.Array | None = None,
  importance_cap: float | None = None,
  hinge: float = 0.0,
  single_step: bool = False,
  reduction: str = "sequence",
  reward_scale: float = 1.0,
  reward_offset: float = 0.0,
  decision_count: Count | None = None,
  action_count: Count | None = None,
  positive_count: jax.Array | None = None,
) -> OreoLoss:
  """Value loss, policy loss and KL penalty of OREO, in one differentiable sum.

    value  = mean_t (V_t - R_t + beta * sg(D_t))^2                      (eq. 8)
    policy = mean_t (sg(V_t) - R_t + beta * (A_t + sg(D_t - A_t)))^2    (eq. 9)
    total  = value + policy + alpha * mean_t kl_t

  The squares are those of `soft_bellman_residuals`; `mean_t` runs over decision
  points (action tokens for the KL), and `sg` stops the gradient. The two losses
  reach disjoint inputs, so one backward pass over `total` gives policy and
  critic their own gradients. An empty mask gives 0 everywhere, with gradients
  of 0.

  Args:
    logps: f32[B, T]; as in `soft_bellman_residuals`, like all arguments that
      are not explained here.
    ref_logps: f32[B, T]. No gradient.
    values: f32[B, T].
    rewards: f32[B, T] or f32[B].
    action_mask: bool[B, T].
    decision_mask: bool[B, T].
    beta: temperature, > 0.
    segment_ids: i32[B, T] for packed rows, or None.
    kl: f32[B, T], KL per token, differentiable (`token_logprobs` computes it
      exactly, in either direction); None takes `kl_k3` of the sampled tokens.
    alpha: weight of the KL; may be traced (see `alpha_loss`). No gradient.
    clip_log: bounds |D_t| in the value loss.
    target_logps: f32[B, T], of an averaged policy, for the value loss.
    importance_cap: weighs both losses of a sequence by `min(exp(D_0), cap)`,
      without gradient; the official code uses e. None does not weigh.
    hinge: `c` of the term `c * max(0, -D_0)`, averaged over the sequences of
      positive reward (before scale and offset). Part of `policy`.
    single_step: residuals over one action, in both losses.
    reduction: "sequence", mean over the decision points of a sequence, then
      over sequences; or "token", mean over all decision points.
    reward_scale: factor on rewards.
    reward_offset: added to the return of every sequence.
    decision_count: `count_mask(decision_mask, segment_ids)` of the whole batch
      where these arrays are one part of it. Losses, gradients and metrics of
      the parts then add up to those of the whole batch.
    action_count: the same of `action_mask`.
    positive_count: `count_positive(rewards, decision_mask, segment_ids)` of the
      whole batch, which the hinge divides by.

  Returns:
    An `OreoLoss` of scalars. Its metrics are means in the same reduction and
    add up over parts as the losses do; `summarize_metrics` derives from the
    added ones what is not additive (explained variance).

  Raises:
    ValueError: if shapes disagree or `reduction` is unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.ones((1, 2), bool)
    >>> loss = oreo_loss(
    ...   jnp.asarray([[-1.0, -2.0]]), jnp.asarray([[-2.0, -2.0]]),
    ...   jnp.asarray([[0.5, 0.5]]), jnp.asarray([1.0]), mask, mask, beta=0.5)
    >>> round(float(loss.value), 3), round(float(loss.policy), 3)
    (0.125, 0.125)

  Source: arXiv 2412.16145, eq. 8 and 9; options from its official code. It
  differs from that code in one policy forward in place of two: log-ratios and
  values are those before either update.
  """
  residuals = soft_bellman_residuals(
    logps,
    ref_logps,
    values,
    rewards,
    action_mask,
    decision_mask,
    beta=beta,
    segment_ids=segment_ids,
    clip_log=clip_log,
    target_logps=target_logps,
    single_step=single_step,
    reward_scale=reward_scale,
    reward_offset=reward_offset,
  )
  paths = residuals.paths
  means = mean_over(
    paths,
    reduction=reduction,
    decision_count=decision_count,
    action_count=action_count,
  )
  importance = paths.importance(importance_cap)
  extra = {}  # metrics of the options in use
  if clip_log is not None:
    clipped = jnp.abs(paths.target_rest) >= clip_log
    extra["value/clipped"] = weighted_sum(means.decisions, clipped)
  policy_penalty: float | jax.Array = 0.0
  if hinge:
    shortfall = mean_shortfall(paths, means, positive_count)
    policy_penalty = hinge * shortfall
    extra["policy/hinge"] = _stop(shortfall)
  loss = regression_loss(
    residuals,
    means,
    logps,
    ref_logps,
    values,
    kl=kl,
    alpha=alpha,
    value_importance=importance,
    policy_importance=importance,
    policy_penalty=policy_penalty,
  )
  return loss._replace(metrics=loss.metrics | extra)


def value_loss(
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  rewards: jax.Array,
  action_mask: jax.Array,
  decision_mask: jax.Array,
  *,
  beta: float,
  **options: Any,
) -> jax.Array:
  """The value loss alone: `oreo_loss(...).value`, for a critic of its own.

    mean_t (V_t - R_t + beta * sg(D_t))^2

  Args:
    logps: as in `oreo_loss`, like the other arrays. No gradient.
    ref_logps: no gradient.
    values: f32[B, T].
    rewards: f32[B] or f32[B, T].
    action_mask: bool[B, T].
    decision_mask: bool[B, T].
    beta: temperature, > 0.
    **options: those of `oreo_loss`, like `segment_ids`.

  Returns:
    f32[].

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.ones((1, 1), bool)
    >>> one = jnp.ones((1, 1))
    >>> float(value_loss(-one, -2 * one, 0.5 * one, one, mask, mask, beta=1.0))
    0.25

  Source: arXiv 2412.16145, eq. 8.
  """
  return oreo_loss(
    logps,
    ref_logps,
    values,
    rewards,
    action_mask,
    decision_mask,
    beta=beta,
    **options,
  ).value


def policy_loss(
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  rewards: jax.Array,
  action_mask: jax.Array,
  decision_mask: jax.Array,
  *,
  beta: float,
  **options: Any,
) -> jax.Array:
  """The policy loss alone, without KL penalty: `oreo_loss(...).policy`.

    mean_t (sg(V_t) - R_t + beta * (A_t + sg(D_t - A_t)))^2

  Args:
    logps: as in `oreo_loss`, like the other arrays; alone carries gradient.
    ref_logps: no gradient.
    values: f32[B, T]. No gradient.
    rewards: f32[B] or f32[B, T].
    action_mask: bool[B, T].
    decision_mask: bool[B, T].
    beta: temperature, > 0.
    **options: those of `oreo_loss`, like `segment_ids`.

  Returns:
    f32[].

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.ones((1, 1), bool)
    >>> one = jnp.ones((1, 1))
    >>> float(policy_loss(-one, -3 * one, 0.5 * one, one, mask, mask, beta=1.0))
    2.25

  Source: arXiv 2412.16145, eq. 9.
  """
  return oreo_loss(
    logps,
    ref_logps,
    values,
    rewards,
    action_mask,
    decision_mask,
    beta=beta,
    **options,
  ).policy
