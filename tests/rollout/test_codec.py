"""The one door between text and tokens."""

import numpy as np
import pytest

from oreo_jax import data
from oreo_jax.config import DataConfig
from oreo_jax.decode import Answer
from oreo_jax.rollout import Codec, grade_texts, graded_trajectories
from oreo_jax.tasks import Problem

TOKENIZER = data.make_tokenizer("byte")


def codec(**settings):
  return Codec.make(TOKENIZER, DataConfig(**settings), len(TOKENIZER))


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


class Right:
  """Finds everything right."""

  def grade(self, problems, responses):
    return np.ones(len(responses), np.float32)

  def grading_report(self):
    return {}


def answer(request, tokens, logps):
  return Answer(
    request, 3, np.int32(tokens), np.float32(logps), True, stopped=False
  )


def test_what_was_sampled_is_what_is_trained_on():
  door = codec()
  end = door.end_ids[0]
  problems = [Problem("0", "x"), Problem("1", "y")]
  answers = [
    answer(0, [ord("a"), end], [-1.0, -0.5]),
    answer(1, [ord("b"), ord("c"), end], [-0.25, -2.0, -3.0]),
  ]
  trajectories = graded_trajectories(answers, problems, Right(), door)
  assert [t.turns[1].content for t in trajectories] == ["a", "bc"]
  assert [t.id for t in trajectories] == ["0/3", "1/3"]
  sequences = door.tokenize(trajectories)
  for each, sequence in zip(answers, sequences, strict=True):
    action = sequence.action_mask
    assert sequence.tokens[action].tolist() == each.tokens.tolist()
    np.testing.assert_array_equal(
      sequence.extras["behaviour_logps"][action], each.logps
    )
  prompts = door.prompts(problems)
  assert (
    prompts[0].tolist()
    == sequences[0].tokens[~sequences[0].action_mask].tolist()
  )


def test_an_answer_that_was_cut_off_earns_nothing():
  rewards = grade_texts(
    Right(), [Problem("0", "x")] * 2, ["1", "2"], np.array([True, False])
  )
  assert rewards.tolist() == [1.0, 0.0]
