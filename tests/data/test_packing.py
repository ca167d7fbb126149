import numpy as np
import pytest

from oreo_jax.data import packing
from oreo_jax.data.tokens import Tokenized


def tokenized(tokens, prompt, reward):
  tokens = np.array(tokens, np.int32)
  action = np.arange(len(tokens)) >= prompt
  decision = np.arange(len(tokens)) == prompt
  rewards = np.zeros(len(tokens), np.float32)
  rewards[-1] = reward
  return Tokenized(tokens, action, decision, rewards)


def test_pack_by_hand():
  batch = packing.pack(
    [tokenized([5, 6, 7], 1, 1.0), tokenized([8, 9, 3, 0], 2, 0.5)],
    row_length=6,
  )
  # Token 0 is data where its segment says so.
  assert batch.tokens.tolist() == [[5, 6, 8, 9, 3, 0]]
  assert batch.targets.tolist() == [[6, 7, 9, 3, 0, 0]]
  assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
  assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 0]]
  assert batch.action_mask.tolist() == [[True, True, False, True, True, False]]
  assert batch.decision_mask.tolist() == [
    [True, False, False, True, False, False]
  ]
  assert batch.rewards.tolist() == [[0, 1, 0, 0, 0.5, 0]]
  assert batch.extras == {}
  assert [field.dtype.name for field in batch[:-1]] == [
    *["int32"] * 4,
    "bool",
    "bool",
    "float32",
  ]


def test_pack_to_a_number_of_rows():
  sequences = [tokenized([1, 2, 3], 1, 1.0)] * 3
  batch = packing.pack(sequences, row_length=4, batch_size=3)
  assert (batch.segment_ids > 0).sum(axis=1).tolist() == [4, 2, 0]
  assert packing.pack(sequences, row_length=4, max_segments=1).tokens.shape == (
    3,
    4,
  )
  with pytest.raises(ValueError, match="need 2 rows"):
    packing.pack(sequences, row_length=4, batch_size=1)
  with pytest.raises(ValueError, match=r"5 tokens.*takes 4.*row_length"):
    packing.pack([tokenized([1] * 5, 1, 1.0)], row_length=3)


@pytest.mark.parametrize("seed", range(20))
def test_plan_places_everything_within_bounds(seed):
  rng = np.random.default_rng(seed)
  row_length = int(rng.integers(1, 200))
  count = int(rng.integers(1, 400))
  limit = [None, 1, 3][seed % 3]
  slots = rng.integers(1, row_length + 1, count)
  order = rng.permutation(count)
  plan = packing.plan_rows(
    slots, order, row_length=row_length, max_members=limit, window=64
  )
  assert sorted(plan.members.tolist()) == list(range(count))
  rows = [plan.row(r) for r in range(plan.num_rows)]
  assert all(1 <= len(row) <= (limit or count) for row in rows)
  assert all(slots[row].sum() <= row_length for row in rows)
  shuffled = plan.permute(rng.permutation(plan.num_rows))
  assert {tuple(shuffled.row(r)) for r in range(plan.num_rows)} == {
    tuple(row) for row in rows
  }
  if limit is None and plan.num_rows > 1:
    # Best fit leaves no two rows that would fit into one, except by windows.
    loads = np.sort([slots[row].sum() for row in rows])
    assert loads[0] + loads[1] > row_length


def test_plan_is_full_and_random():
  rng = np.random.default_rng(0)
  slots = np.clip(rng.lognormal(5.0, 0.5, 20_000).astype(int), 10, 1023)
  plan = packing.plan_rows(slots, rng.permutation(len(slots)), row_length=1024)
  assert slots.sum() / (plan.num_rows * 1024) > 0.99
  other = packing.plan_rows(slots, rng.permutation(len(slots)), row_length=1024)
  together = {frozenset(plan.row(r).tolist()) for r in range(plan.num_rows)}
  again = {frozenset(other.row(r).tolist()) for r in range(other.num_rows)}
  assert len(together & again) < 0.01 * len(together)


@pytest.mark.parametrize("row_length", [320, 512, 1024, 2048])
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_gsm8k_answers_are_at_least_95_percent_full(seed, row_length):
  # Quantiles of the lengths, in words, digits and signs, of the 4,000 answers
  # of models that were published with GSM8K. At 320 slots a row takes two.
  rng = np.random.default_rng(seed)
  slots = np.interp(
    rng.random(4000),
    (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0),
    (50, 92, 130, 165, 212, 301, 400),
  ).astype(int)
  slots = slots[slots <= row_length]
  plan = packing.plan_rows(
    slots, rng.permutation(len(slots)), row_length=row_length
  )
  assert slots.sum() >= 0.95 * plan.num_rows * row_length
