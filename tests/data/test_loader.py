import jax
import numpy as np
import pytest

from oreo_jax.data import make_loader
from oreo_jax.data.tokens import Tokenized


def make_sequences(count, *, low=3, high=40, seed=0):
  """Sequences whose tokens name them: 1000 * i + position."""
  rng = np.random.default_rng(seed)
  sequences = []
  for i in range(count):
    length = int(rng.integers(low, high))
    prompt = int(rng.integers(1, length))
    action = np.arange(length) >= prompt
    rewards = np.zeros(length, np.float32)
    rewards[-1] = i % 2
    sequences.append(
      Tokenized(
        tokens=(1000 * i + np.arange(length)).astype(np.int32),
        action_mask=action,
        decision_mask=action,
        rewards=rewards,
        id=str(i),
      )
    )
  return sequences


def unpacked(batch):
  """Every sequence of a batch, rebuilt from inputs and targets."""
  found = []
  for row in range(len(batch.tokens)):
    for k in range(1, batch.segment_ids[row].max(initial=0) + 1):
      at = np.flatnonzero(batch.segment_ids[row] == k)
      assert (np.diff(at) == 1).all()
      tokens = np.append(batch.tokens[row, at], batch.targets[row, at[-1]])
      np.testing.assert_array_equal(tokens[1:], batch.targets[row, at])
      np.testing.assert_array_equal(
        batch.positions[row, at], np.arange(len(at))
      )
      found.append((tokens, batch.action_mask[row, at], batch.rewards[row, at]))
  return found


def all_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"pack": False},
    {"shuffle": False},
    {"max_segments": 2},
    {"batch_size": 1},
    {"row_length": 39},
  ],
)
def test_every_sequence_once_an_epoch(options):
  sequences = make_sequences(101)
  options = {"batch_size": 4, "row_length": 64, "seed": 3, **options}
  loader = make_loader(sequences, epochs=3, **options)
  for epoch in range(3):
    seen = []
    for step in range(loader.num_steps):
      if loader.epoch_of(step) != epoch:
        continue
      batch = loader.batch(step)
      assert batch.tokens.shape == (
        options["batch_size"],
        options["row_length"],
      )
      assert batch.segment_ids.max() <= loader.max_segments
      padding = batch.segment_ids == 0
      for field in jax.tree.leaves(batch):
        assert not field[padding].any()
      for tokens, action, rewards in unpacked(batch):
        index = int(tokens[0]) // 1000
        seen.append(index)
        np.testing.assert_array_equal(tokens, sequences[index].tokens)
        np.testing.assert_array_equal(action, sequences[index].action_mask[1:])
        np.testing.assert_array_equal(rewards, sequences[index].rewards[1:])
    assert sorted(seen) == list(range(101))


def test_one_sequence_a_row_without_packing():
  loader = make_loader(
    make_sequences(10), batch_size=5, row_length=64, pack=False
  )
  assert loader.num_steps == 2
  assert loader.max_segments == 1
  assert (loader.batch(0).segment_ids.max(axis=1) == 1).all()


def test_order_depends_on_seed_and_epoch_alone():
  sequences = make_sequences(60)
  options = {"batch_size": 3, "row_length": 64}
  loader = make_loader(sequences, epochs=2, seed=1, **options)
  same = make_loader(sequences, epochs=5, seed=1, **options)
  other = make_loader(sequences, epochs=2, seed=2, **options)
  # Seeking backwards, from another loader, gives the same batch.
  for step in reversed(range(loader.num_steps)):
    all_equal(loader.batch(step), same.batch(step))
  assert (loader.batch(0).tokens != other.batch(0).tokens).any()
  second = loader.steps_in(0)
  assert loader.epoch_of(second - 1) == 0
  assert loader.epoch_of(second) == 1
  assert (loader.batch(0).tokens != loader.batch(second).tokens).any()
  resumed = list(loader.iterate(second))
  assert [step for step, _ in resumed] == list(range(second, loader.num_steps))
  all_equal(resumed[0][1], loader.batch(second))


def test_not_shuffled_visits_in_order_without_packing():
  loader = make_loader(
    make_sequences(7), batch_size=2, row_length=64, pack=False, shuffle=False
  )
  indices = [loader.sequence_indices(step).ravel() for step in range(4)]
  assert np.concatenate(indices).tolist() == [0, 1, 2, 3, 4, 5, 6, -1]


def test_indices_count_the_sequences_that_were_dropped_too():
  loader = make_loader(
    make_sequences(40), batch_size=4, row_length=20, on_long="skip"
  )
  assert 0 < loader.dropped < 40
  for step in range(loader.num_steps):
    batch, indices = loader.batch(step), loader.sequence_indices(step)
    for row, slot in zip(*np.nonzero(batch.segment_ids), strict=True):
      named = indices[row, batch.segment_ids[row, slot] - 1]
      assert batch.tokens[row, slot] // 1000 == named


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_batch(process_count):
  sequences = make_sequences(50)
  options = {"batch_size": 4, "row_length": 64, "epochs": 2}
  whole = make_loader(sequences, **options)
  parts = [
    make_loader(
      sequences, process_index=i, process_count=process_count, **options
    )
    for i in range(process_count)
  ]
  for step in range(whole.num_steps):
    for name in ("batch", "mismatched", "sequence_indices"):
      pieces = [getattr(part, name)(step) for part in parts]
      expected = getattr(whole, name)(step)
      if name == "sequence_indices":
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
      else:
        all_equal(
          jax.tree.map(lambda *rows: np.concatenate(rows), *pieces), expected
        )


def test_sequence_indices_name_the_segments():
  sequences = make_sequences(40)
  loader = make_loader(sequences, batch_size=4, row_length=80)
  for step, batch in loader.iterate():
    indices = loader.sequence_indices(step)
    assert indices.shape == (4, loader.max_segments)
    for row, k in zip(*np.nonzero(indices >= 0), strict=True):
      at = np.flatnonzero(batch.segment_ids[row] == k + 1)
      assert batch.tokens[row, at[0]] == 1000 * indices[row, k]
    assert ((indices >= 0).sum(axis=1) == batch.segment_ids.max(axis=1)).all()


def test_fill_counts_the_slots_in_use():
  sequences = make_sequences(500)
  loader = make_loader(sequences, batch_size=2, row_length=256)
  used = sum((b.segment_ids > 0).sum() for _, b in loader.iterate())
  total = loader.num_steps * 2 * 256
  assert loader.fill() == pytest.approx(used / total)
  assert loader.fill() > 0.95


def test_last_batch_is_padded_or_dropped():
  sequences = make_sequences(10)
  options = {"batch_size": 4, "row_length": 64, "pack": False}
  padded = make_loader(sequences, **options)
  assert padded.num_steps == 3
  assert (padded.batch(2).segment_ids.max(axis=1) > 0).sum() == 2
  dropped = make_loader(sequences, drop_last=True, **options)
  assert dropped.num_steps == 2
  with pytest.raises(ValueError, match="less than one batch"):
    make_loader(sequences[:3], drop_last=True, **options)


@pytest.mark.parametrize(
  "epochs, steps", [(0.5, 5), (1, 10), (1.5, 15), (2, 20), (0.01, 1)]
)
def test_fractional_epochs(epochs, steps):
  loader = make_loader(
    make_sequences(20), batch_size=2, row_length=64, pack=False, epochs=epochs
  )
  assert loader.num_steps == steps
  with pytest.raises(ValueError, match="outside"):
    loader.epoch_of(steps)


def test_pairs_stand_side_by_side():
  sequences = make_sequences(60)
  pairs = list(zip(sequences[::2], sequences[1::2], strict=True))
  loader = make_loader(pairs, batch_size=2, row_length=128)
  seen = []
  for step, batch in loader.iterate():
    indices = loader.sequence_indices(step)
    chosen, rejected = indices[:, 0::2], indices[:, 1::2]
    there = chosen >= 0
    np.testing.assert_array_equal(rejected[there], chosen[there] + 1)
    assert (rejected[~there] == -1).all()
    seen.extend(chosen[there])
    first = [int(tokens[0]) // 1000 for tokens, _, _ in unpacked(batch)]
    assert first == indices[indices >= 0].tolist()
  assert sorted(seen) == list(range(0, 60, 2))


def test_mismatched_keeps_segments_and_rotates_completions():
  sequences = make_sequences(50)
  loader = make_loader(sequences, batch_size=4, row_length=96)
  for step, batch in loader.iterate():
    ours = unpacked(batch)
    mixed = unpacked(loader.mismatched(step))
    assert len(mixed) == len(ours)
    for k, (tokens, action, rewards) in enumerate(mixed):
      mine = sequences[int(ours[k][0][0]) // 1000]
      other = sequences[int(ours[(k + 1) % len(ours)][0][0]) // 1000]
      prompt = int(mine.action_mask.argmax())
      np.testing.assert_array_equal(tokens[:prompt], mine.tokens[:prompt])
      completion = other.tokens[other.action_mask]
      length = len(tokens) - prompt
      # Whole, unless the end of the row cut it.
      np.testing.assert_array_equal(tokens[prompt:], completion[:length])
      assert length >= 1
      assert action.sum() == length
      assert not rewards.any()


def test_long_sequences_raise_or_are_dropped():
  sequences = make_sequences(10, low=3, high=9)
  sequences.append(make_sequences(1, low=30, high=31)[0]._replace(id="giant"))
  with pytest.raises(ValueError, match=r"giant of 30 tokens.*row_length"):
    make_loader(sequences, batch_size=2, row_length=10)
  loader = make_loader(sequences, batch_size=2, row_length=10, on_long="skip")
  assert (loader.num_sequences, loader.dropped) == (10, 1)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"process_count": 3}, r"train\.batch_size"),
    ({"process_index": 1}, "process_index"),
    ({"epochs": 0}, "positive"),
    ({"batch_size": 0}, "positive"),
    ({"max_segments": 0}, "max_segments"),
    ({"on_long": "truncate"}, r"data\.on_long"),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    make_loader(
      make_sequences(5), **{"batch_size": 4, "row_length": 64, **options}
    )


def test_nothing_to_load():
  with pytest.raises(ValueError, match="no sequence"):
    make_loader([], batch_size=1, row_length=8)
  single = make_sequences(1)[0]._replace(tokens=np.zeros(1, np.int32))
  with pytest.raises(ValueError, match="needs 2"):
    make_loader([single], batch_size=1, row_length=8)
