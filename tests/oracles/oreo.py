"""The OREO losses by loops over rows, sequences and tokens, in float64.

Stop-gradients are made visible: every function takes the live arrays and,
beside them, the arrays (`frozen_logps`, `frozen_values`) that stand wherever
the definition stops a gradient. With both equal it is the loss; moving only
the live arrays by finite differences gives the gradient it must have.
"""

import dataclasses
import math

import numpy as np


def sequences(action_mask, segment_ids=None):
  """List of (row, [indices]) of every sequence, padding left out."""
  rows, length = np.shape(action_mask)
  places = []
  for b in range(rows):
    if segment_ids is None:
      places.append((b, list(range(length))))
      continue
    ids = [int(x) for x in segment_ids[b]]
    for k in sorted(set(ids) - {0}):
      places.append((b, [t for t in range(length) if ids[t] == k]))
  return places


def last_action(indices, action_mask, b):
  """Index of the last action token of a sequence, None if it has none."""
  actions = [t for t in indices if action_mask[b][t]]
  return actions[-1] if actions else None


def spread_rewards(rewards, action_mask, segment_ids=None, mul=1.0, add=0.0):
  """[B, T] rewards: a reward per row goes to the row's last action token.

  `mul` scales every reward; `add` is added once a sequence, at its last
  action token, so that the return of a sequence is `return * mul + add`.
  """
  rewards = np.asarray(rewards, np.float64)
  out = np.zeros(np.shape(action_mask))
  for b, indices in sequences(action_mask, segment_ids):
    last = last_action(indices, action_mask, b)
    if last is None:
      continue
    if rewards.ndim == 1:
      out[b, last] = rewards[b] * mul
    else:
      for t in indices:
        out[b, t] = rewards[b, t] * mul
    out[b, last] += add
  return out


def kl_k3(logps, ref_logps):
  """exp(ref - logp) - 1 - (ref - logp), elementwise."""
  out = np.zeros(np.shape(logps))
  for index in np.ndindex(out.shape):
    gap = float(ref_logps[index]) - float(logps[index])
    out[index] = math.exp(gap) - 1 - gap
  return out


@dataclasses.dataclass
class Decision:
  """What the losses need of one decision point."""

  value: float  # V(s_t), live
  frozen_value: float  # V(s_t) behind a stop-gradient
  ret: float  # R_t, sum of rewards from t on
  reward: float  # rewards from t up to the next decision point
  advantage: float  # A_t, live
  frozen_advantage: float  # A_t behind a stop-gradient
  suffix: float  # D_t behind a stop-gradient
  target_suffix: float  # D_t of the policy that the value loss follows
  target_advantage: float  # A_t of that policy
  next_value: float  # V at the next decision point, 0 after the last; live
  frozen_next_value: float


@dataclasses.dataclass
class Trajectory:
  """One sequence: its decision points and its whole log ratio."""

  decisions: list
  log_ratio: float  # D_0, live
  frozen_log_ratio: float
  ret: float  # R_0
  kl: list  # one entry an action token


def trajectories(
  logps,
  ref_logps,
  values,
  rewards,
  action_mask,
  decision_mask,
  *,
  segment_ids=None,
  target_logps=None,
  kl=None,
  reward_mul=1.0,
  reward_add=0.0,
  frozen_logps=None,
  frozen_values=None,
):
  """Reads the arrays into a list of `Trajectory`."""
  frozen_logps = logps if frozen_logps is None else frozen_logps
  frozen_values = values if frozen_values is None else frozen_values
  target_logps = frozen_logps if target_logps is None else target_logps
  rewards = spread_rewards(
    rewards, action_mask, segment_ids, reward_mul, reward_add
  )

  def log_ratio(array, b, indices):
    return sum(
      float(array[b][t]) - float(ref_logps[b][t])
      for t in indices
      if action_mask[b][t]
    )

  out = []
  for b, indices in sequences(action_mask, segment_ids):
    starts = [t for t in indices if decision_mask[b][t]]
    decisions = []
    for i, t in enumerate(starts):
      following = starts[i + 1] if i + 1 < len(starts) else None
      rest = [u for u in indices if u >= t]
      action = [u for u in rest if following is None or u < following]
      decisions.append(
        Decision(
          value=float(values[b][t]),
          frozen_value=float(frozen_values[b][t]),
          ret=sum(rewards[b][u] for u in rest),
          reward=sum(rewards[b][u] for u in action),
          advantage=log_ratio(logps, b, action),
          frozen_advantage=log_ratio(frozen_logps, b, action),
          suffix=log_ratio(frozen_logps, b, rest),
          target_suffix=log_ratio(target_logps, b, rest),
          target_advantage=log_ratio(target_logps, b, action),
          next_value=0.0 if following is None else float(values[b][following]),
          frozen_next_value=0.0
          if following is None
          else float(frozen_values[b][following]),
        )
      )
    out.append(
      Trajectory(
        decisions=decisions,
        log_ratio=log_ratio(logps, b, indices),
        frozen_log_ratio=log_ratio(frozen_logps, b, indices),
        ret=sum(rewards[b][t] for t in indices),
        kl=[]
        if kl is None
        else [float(kl[b][t]) for t in indices if action_mask[b][t]],
      )
    )
  return out


def reduce(per_sequence, weights=None, token_mean=False):
  """Mean over each sequence's entries, then over the sequences that have any;
  with `token_mean` over all entries at once. Nothing at all gives 0.
  """
  weights = [1.0] * len(per_sequence) if weights is None else weights
  selected = [(x, w) for x, w in zip(per_sequence, weights, strict=True) if x]
  if not selected:
    return 0.0
  if token_mean:
    return sum(w * sum(x) for x, w in selected) / sum(
      len(x) for x, _ in selected
    )
  return sum(w * sum(x) / len(x) for x, w in selected) / len(selected)


def clip(x, bound):
  """x within [-bound, bound]; no bound, no change."""
  return x if bound is None else max(-bound, min(bound, x))


def importance_weights(paths, cap):
  """min(exp(D_0), cap) of every sequence, ones without a cap."""
  return [
    1.0 if cap is None else min(math.exp(s.frozen_log_ratio), cap)
    for s in paths
  ]


def value_loss(
  *arrays,
  beta,
  clip_log=None,
  importance_cap=None,
  single_step=False,
  token_mean=False,
  **kwargs,
):
  """Equation 8, or the squared one-step residual with a stopped next value."""
  paths = trajectories(*arrays, **kwargs)
  errors = []
  for sequence in paths:
    errors.append([])
    for x in sequence.decisions:
      if single_step:
        target = x.reward + x.frozen_next_value - beta * x.target_advantage
      else:
        target = x.ret - beta * clip(x.target_suffix, clip_log)
      errors[-1].append((x.value - target) ** 2)
  return reduce(errors, importance_weights(paths, importance_cap), token_mean)


def policy_loss(
  *arrays,
  beta,
  importance_cap=None,
  single_step=False,
  token_mean=False,
  **kwargs,
):
  """Equation 9, or the one-step residual."""
  paths = trajectories(*arrays, **kwargs)
  errors = []
  for sequence in paths:
    errors.append([])
    for x in sequence.decisions:
      if single_step:
        residual = (
          x.frozen_value - x.reward - x.frozen_next_value + beta * x.advantage
        )
      else:
        rest = x.suffix - x.frozen_advantage
        residual = x.frozen_value - x.ret + beta * (x.advantage + rest)
      errors[-1].append(residual**2)
  return reduce(errors, importance_weights(paths, importance_cap), token_mean)


def kl_loss(*arrays, token_mean=False, **kwargs):
  """Mean of `kl` over action tokens."""
  paths = trajectories(*arrays, **kwargs)
  return reduce([s.kl for s in paths], token_mean=token_mean)


def hinge_loss(*arrays, hinge, **kwargs):
  """Mean of c * max(0, -D_0) over the sequences whose return is positive."""
  positive = [
    s for s in trajectories(*arrays, **kwargs) if s.decisions and s.ret > 0
  ]
  terms = [hinge * max(0.0, -s.log_ratio) for s in positive]
  return sum(terms) / len(terms) if terms else 0.0


def oreo_loss(
  *arrays,
  beta,
  kl=None,
  alpha=0.0,
  clip_log=None,
  importance_cap=None,
  hinge=0.0,
  single_step=False,
  token_mean=False,
  **kwargs,
):
  """Returns a dict of total, value, policy (hinge included) and kl.

  Without `kl` the k3 estimator stands in. The hinge looks at the sign of the
  reward before scale and offset.
  """
  shared = dict(
    beta=beta,
    importance_cap=importance_cap,
    single_step=single_step,
    token_mean=token_mean,
  )
  value = value_loss(*arrays, clip_log=clip_log, **shared, **kwargs)
  policy = policy_loss(*arrays, **shared, **kwargs)
  unscaled = {
    k: v for k, v in kwargs.items() if k not in ("reward_mul", "reward_add")
  }
  if hinge:
    policy += hinge_loss(*arrays, hinge=hinge, **unscaled)
  penalty = kl_loss(
    *arrays,
    kl=masked_k3(*arrays) if kl is None else kl,
    token_mean=token_mean,
    **kwargs,
  )
  return {
    "total": value + policy + alpha * penalty,
    "value": value,
    "policy": policy,
    "kl": penalty,
  }


def masked_k3(logps, ref_logps, values, rewards, action_mask, decision_mask):
  """k3 on action tokens, 0 elsewhere (where logps may be anything)."""
  out = np.zeros(np.shape(action_mask))
  for index in np.argwhere(action_mask):
    b, t = index
    out[b, t] = kl_k3(
      np.array([logps[b][t]], float), np.array([ref_logps[b][t]], float)
    )[0]
  return out


def alpha_loss(log_alpha, kl, target):
  """Loss of the learned coefficient of the KL term."""
  return -log_alpha * (kl - target)


def gradient(function, array, where, step=1e-4):
  """Central differences of a scalar function, entry by entry of `where`;
  0 at the others.
  """
  array = np.array(array, np.float64)
  out = np.zeros_like(array)
  for index in map(tuple, np.argwhere(where)):
    original = array[index]
    array[index] = original + step
    above = function(array)
    array[index] = original - step
    below = function(array)
    array[index] = original
    out[index] = (above - below) / (2 * step)
  return out
