"""The one door between text and tokens."""

import numpy as np
import pytest

from oreo_jax import data
from oreo_jax.config import DataConfig
from oreo_jax.decode import Generation
from oreo_jax.rollout import Answers, Codec, grade_texts
from oreo_jax.tasks import Problem

TOKENIZER = data.make_tokenizer("byte")


def codec(**settings):
  return Codec.make(TOKENIZER, DataConfig(**settings), len(TOKENIZER))


def generation(*rows, finished=True):
  width = max(map(len, rows))
  tokens = np.array([[*row, *[0] * (width - len(row))] for row in rows])
  lengths = np.array([len(row) for row in rows], np.int32)
  return Generation(
    tokens.astype(np.int32),
    lengths,
    np.full(len(rows), finished),
    np.where(np.arange(width)[None] < lengths[:, None], -0.5, 0.0),
  )


@pytest.mark.parametrize(
  ("delimiters", "text", "starts"),
  [
    ("lines", "a\nb\n\nc", [0, 2, 4]),
    ("lines", "", []),
    ("lines", "a\n", [0]),
    ("sentences", "It is so. Then 3.5 $x.$ end", [0, 10, 24]),
  ],
)
def test_steps_of_an_answer_and_of_training_are_the_same(
  delimiters, text, starts
):
  door = codec(delimiters=delimiters)
  tokens = np.array(TOKENIZER.encode(text), np.int32)
  assert door.step_starts(tokens).tolist() == starts
  trajectory = door.trajectory(Problem("0", "?"), text, 1.0)
  (sequence,) = door.tokenize([trajectory], granularity="step")
  answer = sequence.decision_mask[sequence.action_mask]
  # The end token is an action of its own, so that the value of a finished
  # answer is trained.
  assert np.flatnonzero(answer).tolist() == [*starts, len(text)]


def test_what_was_sampled_is_what_is_trained_on():
  door = codec()
  end = door.end_ids[0]
  out = generation([ord("a"), end], [ord("b"), ord("c"), end])
  problems = [Problem("0", "x"), Problem("1", "y")]
  answers = Answers(problems, out, door.texts(out), np.ones(2, np.float32), 1.0)
  assert answers.texts == ["a", "bc"]
  sequences = door.tokenize(answers.trajectories(door))
  for row, sequence in enumerate(sequences):
    length = out.lengths[row]
    action = sequence.action_mask
    assert sequence.tokens[action].tolist() == out.tokens[row, :length].tolist()
    np.testing.assert_array_equal(
      sequence.extras["behaviour_logps"][action], out.logps[row, :length]
    )
  prompts = door.prompts(problems)
  assert (
    prompts[0].tolist()
    == sequences[0].tokens[~sequences[0].action_mask].tolist()
  )


def test_an_answer_that_was_cut_off_earns_nothing():
  class Right:
    def grade(self, problems, responses):
      return np.ones(len(responses), np.float32)

  rewards = grade_texts(
    Right(), [Problem("0", "x")], ["1", "2"], np.array([True, False])
  )
  assert rewards.tolist() == [1.0, 0.0]
