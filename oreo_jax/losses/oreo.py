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

from typing import NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax.losses import segments
from oreo_jax.losses.kl import mean_kl_penalty
from oreo_jax.losses.metrics import value_metrics
from oreo_jax.losses.paths import follow_paths, mean_over
from oreo_jax.losses.segments import Count, weighted_sum

_stop = jax.lax.stop_gradient


class OreoLoss(NamedTuple):
  """The loss and its parts, scalars of float32."""

  total: jax.Array  # value + policy_weight * (policy + alpha * kl)
  value: jax.Array  # eq. 8; its gradient reaches `values` alone
  policy: jax.Array  # eq. 9 (+ hinge); its gradient reaches `logps` alone
  kl: jax.Array  # mean KL over action tokens, not yet times alpha
  metrics: dict[str, jax.Array]  # see `oreo_loss`; no gradient


def _residuals(paths, values, beta, single_step):
  """Residuals of the two losses and the value's target, f32[B, T]."""
  constant_values = _stop(values)
  if single_step:
    bootstrap = paths.step_rewards() + paths.at_next_decision(constant_values)
    target = bootstrap - beta * paths.target_step
    policy_residual = constant_values - bootstrap + beta * paths.step
  else:
    target = paths.returns - beta * paths.target_rest
    # Its value is V - R + beta * D, its gradient that of the own action alone.
    log_ratio = paths.step + _stop(paths.rest - paths.step)
    policy_residual = constant_values - paths.returns + beta * log_ratio
  return values - target, policy_residual, target


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
  policy_weight: float | jax.Array = 1.0,
  decision_count: Count | None = None,
  action_count: Count | None = None,
  positive_count: jax.Array | None = None,
) -> OreoLoss:
  """Value loss, policy loss and KL penalty of OREO, in one differentiable sum.

    value  = mean_t (V_t - R_t + beta * sg(D_t))^2                      (eq. 8)
    policy = mean_t (sg(V_t) - R_t + beta * (A_t + sg(D_t - A_t)))^2    (eq. 9)
    total  = value + policy_weight * (policy + alpha * mean_t kl_t)

  `mean_t` runs over decision points (action tokens for the KL), and `sg` stops
  the gradient. The two losses reach disjoint inputs, so one backward pass over
  `total` gives policy and critic their own gradients. An empty mask gives 0
  everywhere, with gradients of 0.

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
    kl: f32[B, T], KL per token, differentiable (`token_logprobs` computes it
      exactly, in either direction); None takes `kl_k3` of the sampled tokens.
    alpha: weight of the KL; may be traced (see `alpha_loss`). No gradient.
    clip_log: bounds |D_t| in the value loss.
    target_logps: f32[B, T], log-probabilities of an averaged (EMA) policy that
      take the place of `logps` in D_t of the value loss. No gradient.
    importance_cap: weighs both losses of a sequence by `min(exp(D_0), cap)`,
      without gradient; the official code uses e. None does not weigh.
    hinge: `c` of the term `c * max(0, -D_0)`, averaged over the sequences of
      positive reward (before scale and offset). Part of `policy`.
    single_step: the residual over one action instead of the rest of the
      sequence, `V_t - r_t - sg(V_next) + beta * A_t`, in both losses; r_t is
      the reward up to the next decision point, V_next the value there (0 after
      the last). `clip_log` does not apply to it.
    reduction: "sequence", mean over the decision points of a sequence, then
      over sequences; or "token", mean over all decision points.
    reward_scale: factor on rewards.
    reward_offset: added to the return of every sequence, as if to its terminal
      reward: `R_t = reward_scale * R_t + reward_offset`.
    policy_weight: 0 freezes the policy while the critic warms up; may be
      traced, e.g. a function of the step. The optimiser must not move the
      policy on a gradient of zero (weight decay would).
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
  paths = follow_paths(
    logps,
    ref_logps,
    values,
    rewards,
    action_mask,
    decision_mask,
    segment_ids,
    target_logps=target_logps,
    clip_log=clip_log,
    reward_scale=reward_scale,
    reward_offset=reward_offset,
  )
  segments.check_shapes(logps=logps, kl=kl)
  means = mean_over(
    action_mask,
    decision_mask,
    segment_ids,
    reduction=reduction,
    decision_count=decision_count,
    action_count=action_count,
  )
  importance = paths.importance(importance_cap)
  # Padding may hold anything: what the means leave out has no gradient either.
  values = jnp.where(paths.decisions, values.astype(jnp.float32), 0.0)
  value_residual, policy_residual, target = _residuals(
    paths, values, beta, single_step
  )
  value = weighted_sum(means.decisions, importance * jnp.square(value_residual))
  policy = weighted_sum(
    means.decisions, importance * jnp.square(policy_residual)
  )
  positive = (means.sequences > 0.0) & (paths.raw_returns > 0.0)
  if positive_count is None:
    positive_count = positive.sum(dtype=jnp.float32)
  shortfall = weighted_sum(
    jnp.where(positive, 1.0 / jnp.maximum(positive_count, 1.0), 0.0),
    jax.nn.relu(-paths.rest),
  )
  policy = policy + hinge * shortfall
  mean_kl = mean_kl_penalty(kl, logps, ref_logps, paths.actions, means.actions)
  total = value + policy_weight * (policy + _stop(alpha) * mean_kl)

  metrics = {
    **value_metrics(means.decisions, values, target, value_residual),
    "value/loss": value,
    "value/start": weighted_sum(means.sequences, values),
    "policy/loss": policy,
    "policy/residual_abs": weighted_sum(
      means.decisions, jnp.abs(policy_residual)
    ),
    "policy/log_ratio": weighted_sum(means.sequences, paths.rest),
    "policy/logp": weighted_sum(means.actions, logps),
    "policy/kl": mean_kl,
    "reward/mean": weighted_sum(means.sequences, paths.raw_returns),
  }
  if hinge:
    metrics["policy/hinge"] = shortfall
  if clip_log is not None:
    clipped = jnp.abs(paths.target_rest) >= clip_log
    metrics["value/clipped"] = weighted_sum(means.decisions, clipped)
  if importance_cap is not None:
    metrics["policy/importance"] = weighted_sum(means.sequences, importance)
  return OreoLoss(total, value, policy, mean_kl, _stop(metrics))


def value_loss(
  logps: jax.Array,
  ref_logps: jax.Array,
  values: jax.Array,
  rewards: jax.Array,
  action_mask: jax.Array,
  decision_mask: jax.Array,
  *,
  beta: float,
  segment_ids: jax.Array | None = None,
  **options,
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
    segment_ids: i32[B, T] or None.
    **options: those of `oreo_loss`.

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
    segment_ids=segment_ids,
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
  segment_ids: jax.Array | None = None,
  **options,
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
    segment_ids: i32[B, T] or None.
    **options: those of `oreo_loss`.

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
    segment_ids=segment_ids,
    **options,
  ).policy
