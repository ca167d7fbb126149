"""DQO's value and policy loss by loops, in float64.

Stop-gradients as in `oracles.oreo`: frozen arrays beside the live ones.
"""

import math

from oracles.oreo import reduce, trajectories


def lambda_returns(decisions, *, beta, lam):
  """G_t of every decision point and, last, 0 for the end of the sequence.

  G_t = (r_t - beta * A_t) + (1 - lam) * V(s_next) + lam * G_next.
  """
  returns = [0.0] * (len(decisions) + 1)
  for i in reversed(range(len(decisions))):
    x = decisions[i]
    soft_reward = x.reward - beta * x.target_advantage
    bootstrap = (1 - lam) * x.frozen_next_value + lam * returns[i + 1]
    returns[i] = soft_reward + bootstrap
  return returns


def dqo_loss(*arrays, beta, lam, weight_cap=None, token_mean=False, **kwargs):
  """Returns (value loss, policy loss).

  `weight_cap` is the largest importance weight exp(D_0); None: all weights 1.
  """
  paths = trajectories(*arrays, **kwargs)
  value_errors, policy_errors, weights = [], [], []
  for sequence in paths:
    returns = lambda_returns(sequence.decisions, beta=beta, lam=lam)
    value_errors.append(
      [(x.value - returns[i]) ** 2 for i, x in enumerate(sequence.decisions)]
    )
    policy_errors.append(
      [
        (beta * x.advantage + x.frozen_value - x.reward - returns[i + 1]) ** 2
        for i, x in enumerate(sequence.decisions)
      ]
    )
    weights.append(
      1.0
      if weight_cap is None
      else min(math.exp(sequence.frozen_log_ratio), weight_cap)
    )
  return (
    reduce(value_errors, token_mean=token_mean),
    reduce(policy_errors, weights, token_mean),
  )
