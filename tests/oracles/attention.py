"""Attention of packed rows, one query at a time, in float64."""

import numpy as np


def attend(query, key, value, segment_ids, *, scale, sliding_window=0):
  """query [B, T, N, H]; key, value [B, T, K, H] -> [B, T, N, H]."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  batch, length, heads, _ = query.shape
  group = heads // key.shape[2]
  out = np.zeros(query.shape)
  for b in range(batch):
    for t in range(length):
      seen = [
        s
        for s in range(t + 1)
        if segment_ids[b, s] == segment_ids[b, t]
        and (not sliding_window or t - s < sliding_window)
      ]
      for n in range(heads):
        scores = key[b, seen, n // group] @ query[b, t, n] * scale
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ value[b, seen, n // group]
  return out
