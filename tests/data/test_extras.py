"""An array a token travels from the trajectory to the device by its name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax.data import (
  Sampled,
  Trajectory,
  load_trajectories,
  make_loader,
  make_tokenizer,
  pack,
  save_trajectories,
  tokenize_trajectories,
)
from oreo_jax.data.tokens import Tokenized
from oreo_jax.sharding import micro_batches, shard_batch

BYTE = make_tokenizer("byte")


def mark(tokens):
  """The invented extra: a number that tells the token it belongs to."""
  return tokens * 0.5 + 1


def make_sequences(count=40):
  rng = np.random.default_rng(0)
  sequences = []
  for index in range(count):
    length = int(rng.integers(2, 20))
    prompt = int(rng.integers(1, length))
    tokens = rng.integers(0, 100, length).astype(np.int32)
    action = np.arange(length) >= prompt
    extras = {
      "mark": mark(tokens),
      "two": np.stack([tokens, -tokens], axis=1),
    }
    rewards = np.zeros(length, np.float32)
    sequences.append(
      Tokenized(tokens, action, action, rewards, id=str(index), extras=extras)
    )
  return sequences


def assert_marked(batch):
  """Every extra stands at the target it belongs to; padding is zero."""
  data = np.asarray(batch.segment_ids) > 0
  targets = np.asarray(batch.targets)
  np.testing.assert_array_equal(
    batch.extras["mark"], np.where(data, mark(targets), 0)
  )
  np.testing.assert_array_equal(
    batch.extras["two"], np.stack([targets, -targets], axis=-1)
  )
  assert batch.extras["two"].dtype == np.int32


def test_extras_through_packing_and_loader():
  sequences = make_sequences()
  assert_marked(pack(sequences, row_length=32))
  loader = make_loader(sequences, batch_size=4, row_length=32)
  for step in range(loader.num_steps):
    assert_marked(loader.batch(step))
    assert_marked(loader.mismatched(step))


def test_rows_without_a_sequence_have_the_same_extras():
  # Otherwise the last batch would be another tree and be compiled again.
  loader = make_loader(
    make_sequences(3), batch_size=8, row_length=32, process_count=8
  )
  last = make_loader(
    make_sequences(3),
    batch_size=8,
    row_length=32,
    process_count=8,
    process_index=7,
  ).batch(0)
  assert not last.segment_ids.any()
  assert jax.tree.structure(last) == jax.tree.structure(loader.batch(0))
  assert last.extras["two"].shape == (1, 32, 2)


def test_extras_on_devices():
  loader = make_loader(make_sequences(), batch_size=8, row_length=32)
  batch = shard_batch(loader.batch(0), tiny.mesh(data=2, fsdp=2))
  assert_marked(batch)
  halves = jax.jit(lambda rows: micro_batches(rows, 2))(batch)
  for half in range(2):
    assert_marked(jax.tree.map(lambda rows, half=half: rows[half], halves))
  total = jax.jit(lambda rows: jnp.sum(rows.extras["mark"]))(batch)
  assert float(total) == pytest.approx(loader.batch(0).extras["mark"].sum())


@pytest.mark.parametrize(
  "extras, message",
  [
    ({}, r"\(no id\) has the extras \[\], others have \['mark', 'two'\]"),
    ({"mark": np.zeros(3), "two": np.zeros((2, 2), int)}, "one a token"),
    ({"mark": np.zeros(2), "two": np.zeros((2, 2))}, "'two'.*float64 with"),
    ({"mark": np.zeros(2), "two": np.zeros(2, np.int32)}, r"with \[\] a"),
  ],
)
def test_sequences_must_agree(extras, message):
  sequences = make_sequences(4)
  tokens = np.array([1, 2], np.int32)
  mask = np.array([False, True])
  odd = Tokenized(tokens, mask, mask, np.zeros(2, np.float32), extras=extras)
  with pytest.raises(ValueError, match=message):
    make_loader([*sequences, odd], batch_size=2, row_length=32)
  with pytest.raises(ValueError, match=message):
    pack([*sequences, odd], row_length=32)


def answer(text, logps=None, extras=(), **fields):
  tokens = [*BYTE.encode(text), BYTE.eos_token_id]
  sampled = Sampled(np.array(tokens), logps, dict(extras))
  return Trajectory.from_text("q", text, 1.0, sampled=(sampled,), **fields)


def test_sampled_logps_ride_along_if_all_have_them():
  with_logps = [
    answer("ab", np.array([-1.0, -2.0, -3.0])),
    answer("a", np.array([-4.0, -5.0])),
  ]
  first, second = tokenize_trajectories(with_logps, BYTE)
  # The prompt was not sampled.
  assert first.extras["behaviour_logps"].tolist() == [0, 0, -1, -2, -3]
  assert second.extras["behaviour_logps"].tolist() == [0, 0, -4, -5]
  assert first.extras["behaviour_logps"].dtype == np.float32
  batch = pack([first, second], row_length=8)
  assert batch.extras["behaviour_logps"].tolist() == [
    [0, -1, -2, -3, 0, -4, -5, 0]
  ]
  for other in (answer("b"), Trajectory.from_text("q", "b", 1.0)):
    sequences = tokenize_trajectories([*with_logps, other], BYTE)
    assert [sequence.extras for sequence in sequences] == [{}] * 3


def test_extras_of_a_row(tmp_path):
  path = tmp_path / "t.jsonl"
  given = [
    answer("ab", np.zeros(3), {"worth": [0.25, 0.5, 1.0]}, id="1"),
    answer("b", np.zeros(2), {"worth": [0.75, 2.0]}, id="2"),
  ]
  save_trajectories(path, given)
  row = json.loads(path.read_text().splitlines()[0])
  assert row["token_extras"] == {"worth": [[0.25, 0.5, 1.0]]}
  trajectories = load_trajectories(path)
  assert trajectories == given
  sequences = tokenize_trajectories(trajectories, BYTE)
  assert sequences[0].extras["worth"].tolist() == [0, 0, 0.25, 0.5, 1.0]
  with pytest.raises(ValueError, match="extras"):
    make_loader(
      tokenize_trajectories([*trajectories, answer("c")], BYTE),
      batch_size=1,
      row_length=8,
    )
  for extras, message in (
    ({"worth": [[0.25]]}, "each of the 3 tokens"),
    ({"worth": [0.25]}, "each of the 3 tokens"),
    ([1], "expected lists by name"),
    ({"behaviour_logps": [[0, 0, 0]]}, 'by the name "logps"'),
  ):
    with pytest.raises(ValueError, match=message):
      load_trajectories([row | {"token_extras": extras}])


def test_turns_agree_on_what_is_recorded():
  turns = Trajectory.from_text("q", "a", 1.0).turns
  with pytest.raises(ValueError, match="for all of its turns or for none"):
    Trajectory(
      turns * 2,
      1.0,
      is_chat=True,
      sampled=(Sampled([1], [-1.0]), Sampled([1])),
    )
