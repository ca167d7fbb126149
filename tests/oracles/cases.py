"""Random trajectories, one a row or packed, with garbage for padding."""

import math

import numpy as np
from oracles import tree

FIELDS = ("logps", "ref_logps", "values", "rewards", "kl", "target_logps")
MASKS = ("action_mask", "decision_mask")
GRANULARITIES = ("token", "step", "response")


def decision_mask(action_mask, granularity, rng):
  """First token of every action: each token, each step or the response."""
  actions = [t for t, on in enumerate(action_mask) if on]
  mask = np.zeros(len(action_mask), bool)
  for i, t in enumerate(actions):
    after_gap = i > 0 and actions[i - 1] != t - 1
    starts = i == 0 or after_gap or rng.uniform() < 0.35
    if granularity == "token" or i == 0 or (granularity == "step" and starts):
      mask[t] = True
  return mask


def trajectory(rng, granularity, actions, *, per_token=False, gaps=True):
  """One sequence: a prompt, then runs of `actions` tokens, observations
  between the runs. `actions` is a tuple of run lengths.

  A prompt of one token leaves no slot before the first action.
  """
  mask = [False] * int(rng.integers(0, 3))
  for i, run in enumerate(actions):
    if i > 0 and gaps:
      mask += [False] * int(rng.integers(1, 3))
    mask += [True] * run
  length = len(mask)
  mask = np.array(mask)
  logps = -rng.uniform(0.05, 3.0, length)
  rewards = np.zeros(length)
  if per_token:
    rewards[mask] = rng.normal(size=int(mask.sum()))
  elif mask.any():
    rewards[np.flatnonzero(mask)[-1]] = float(rng.integers(2))
  return {
    "logps": logps,
    "ref_logps": logps + rng.normal(0, 0.5, length),
    "values": rng.normal(size=length),
    "rewards": rewards,
    "kl": rng.uniform(0, 1, length),
    "target_logps": logps + rng.normal(0, 0.3, length),
    "action_mask": mask,
    "decision_mask": decision_mask(mask, granularity, rng),
  }


# One shape for every layout: nothing is compiled twice.
ROWS, LENGTH = 8, 28
RUNS = ((3,), (1,), (2, 3), (6,), (1, 1, 2), (4,), (2,), (1, 3))
# Several a row, in another order, and rows of padding alone.
PACKING = ((2, 0, 6), (1, 5, 4), (), (3,), (7,))


def trajectories(seed=0, granularity="token", runs=RUNS, **kwargs):
  rng = np.random.default_rng(seed)
  return [trajectory(rng, granularity, run, **kwargs) for run in runs]


def lay_out(sequences, rows, seed=0, garbage=9.0, gap=0, reward_noise=True):
  """Places sequences in rows: `rows[b]` lists the sequences of row b.

  The entry "where" of the answer lists (sequence, row, slice). Everything
  outside the sequences is noise of size `garbage`, and `gap`
  padding slots stand before each sequence of a row but the first. Without
  `reward_noise` padding carries no reward (rows without segment ids cannot
  tell padding from the rest of the sequence).
  """
  rng = np.random.default_rng(1000 + seed)
  shape = (ROWS, LENGTH)
  out = {name: garbage * rng.normal(size=shape) for name in FIELDS}
  if not reward_noise:
    out["rewards"] = np.zeros(shape)
  for name in MASKS:
    out[name] = np.zeros(shape, bool)
  out["segment_ids"] = np.zeros(shape, np.int32)
  out["where"] = []
  for b, row in enumerate(rows):
    start = 0
    for k, index in enumerate(row):
      start += gap if k else 0
      size = len(sequences[index]["logps"])
      span = slice(start, start + size)
      for name in FIELDS + MASKS:
        out[name][b, span] = sequences[index][name]
      out["segment_ids"][b, span] = k + 1
      out["where"].append((index, b, span))
      start += size
    if start > LENGTH:
      raise ValueError(f"row {b} needs {start} slots, has {LENGTH}")
  return out


def unpacked(sequences, segment_ids=True, **kwargs):
  """One sequence a row, with or without segment ids."""
  rows = [[i] for i in range(len(sequences))]
  kwargs.setdefault("reward_noise", segment_ids)
  out = lay_out(sequences, rows, **kwargs)
  if not segment_ids:
    out["segment_ids"] = None
  return out


def packed(sequences, rows=PACKING, **kwargs):
  return lay_out(sequences, rows, **kwargs)


def gather(array, laid_out):
  """The sequences of a [B, T] array, in the order they had before."""
  places = sorted(laid_out["where"], key=lambda entry: entry[0])
  return [np.asarray(array)[b, span] for _, b, span in places]


def tree_paths(beta, granularity, seed):
  """Every path of a random token tree, packed, with the closed-form optimum
  as policy and value.
  """
  rng = np.random.default_rng(seed)
  root = tree.random_tree(rng, depth=4, width=2)
  tree.solve(root, beta)
  sequences = []
  for path in tree.paths(root):
    mask = np.ones(len(path), bool)
    logps = np.array([math.log(node.policy[i]) for node, i in path])
    sequences.append(
      {
        "logps": logps,
        "ref_logps": np.array([math.log(node.prior[i]) for node, i in path]),
        "values": np.array([node.value for node, _ in path]),
        "rewards": np.array([node.reward[i] for node, i in path]),
        "kl": np.zeros(len(path)),
        "target_logps": logps,
        "action_mask": mask,
        "decision_mask": decision_mask(mask, granularity, rng),
      }
    )
  order = rng.permutation(len(sequences))
  return packed(sequences, rows=[order[i::ROWS] for i in range(ROWS)])
