"""Supervised fine-tuning loss by loops, in float64."""

from oracles.oreo import reduce, sequences


def sft_loss(logps, action_mask, segment_ids=None):
  """Mean negative log-likelihood of the action tokens."""
  losses = [
    [-float(logps[b][t]) for t in indices if action_mask[b][t]]
    for b, indices in sequences(action_mask, segment_ids)
  ]
  return reduce(losses, token_mean=True)
