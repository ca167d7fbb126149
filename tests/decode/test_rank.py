"""Best-of-N, its reductions, and votes."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import chain, tiny

from oreo_jax import models
from oreo_jax.data import make_tokenizer
from oreo_jax.decode import (
  Generation,
  answer_values,
  best_of_n,
  majority_vote,
  make_stops,
  rank_all,
  readable_states,
  reduce_values,
  values_all,
  vote_weights,
)

KEY = jax.random.key(2)


def answers_of(lengths, finished, width=4):
  rows = len(lengths)
  return Generation(
    tokens=np.zeros((rows, width), np.int32),
    lengths=np.array(lengths, np.int32),
    finished=np.array(finished),
    logps=np.zeros((rows, width), np.float32),
  )


# V of the prompt, and after 1, 2, 3, 4 tokens.
ALONG = np.array(
  [
    [0.5, 0.25, 1.0, 9.0, 9.0],
    [0.5, 0.0, 0.5, 1.0, 0.75],
    [0.5, -1.0, 9.0, 9.0, 9.0],
  ]
)


@pytest.mark.parametrize(
  "reduction, want",
  [
    # The state after the end-of-sequence does not count (rows 0 and 2).
    ("final", [1.0, 0.75, 0.5]),
    ("min", [0.25, 0.0, 0.5]),
    ("mean", [1.75 / 3, 2.75 / 5, 0.5]),
  ],
)
def test_reductions_by_hand(reduction, want):
  readable = readable_states(answers_of([3, 4, 1], [True, False, True]))
  np.testing.assert_allclose(reduce_values(ALONG, readable, reduction), want)


def test_a_critic_of_step_level_is_read_between_steps():
  tokenizer = make_tokenizer("byte")
  stops = make_stops(tokenizer, ("\n",), len(tokenizer))
  answers = answers_of([5, 5, 5, 1], [True, False, False, True], width=5)
  texts = ["a\nbc\0", "a\nb\nc", "ab\n\nc", "\0"]
  for row, text in enumerate(texts):
    answers.tokens[row, : len(text)] = list(text.encode())
  readable = readable_states(answers, granularity="step", stops=stops)
  assert readable.astype(int).tolist() == [
    # Before each step, and before the end-of-sequence in the fifth place.
    [1, 0, 1, 0, 1, 0],
    # What was cut off inside a step is not read there.
    [1, 0, 1, 0, 1, 0],
    # The blank line belongs to the step behind it.
    [1, 0, 0, 1, 0, 0],
    [1, 0, 0, 0, 0, 0],
  ]
  values = np.arange(24, dtype=np.float32).reshape(4, 6)
  assert reduce_values(values, readable).tolist() == [4, 10, 15, 18]
  assert reduce_values(values, readable, "min").tolist() == [0, 6, 12, 18]
  assert reduce_values(values, readable, "mean").tolist() == [2, 8, 13.5, 18]


def test_a_critic_of_response_level_is_refused():
  answers = answers_of([1], [True])
  with pytest.raises(ValueError, match="granularity: .*'response'"):
    readable_states(answers, granularity="response")
  with pytest.raises(ValueError, match="granularity: .*'response'"):
    rank_all({}, [[1]], answers, tiny.MODEL, granularity="response")
  with pytest.raises(ValueError, match="stops: expected"):
    readable_states(answers, granularity="step")


def test_values_along_answers_are_those_of_a_fresh_forward():
  critic = tiny.draw_params(head="value", seed=3)
  prompts = [[1, 2, 3], [7]]
  rng = np.random.default_rng(0)
  answers = answers_of([4, 2, 3, 1], [False] * 4)._replace(
    tokens=rng.integers(0, tiny.VOCAB, (4, 4)).astype(np.int32)
  )
  along = answer_values(critic, prompts, answers, tiny.MODEL)
  assert along.shape == (4, 5)
  for row in range(4):
    prompt, length = prompts[row // 2], answers.lengths[row]
    text = [*prompt, *answers.tokens[row, :length], *[0] * 8][:8]
    hidden = models.apply(critic, jnp.asarray([text]), tiny.MODEL).hidden
    want = models.values(critic, hidden)[0]
    at = len(prompt) - 1 + np.arange(length + 1)
    np.testing.assert_allclose(along[row, : length + 1], want[at], atol=1e-5)
  # One prompt a batch, and in one go.
  for size in (2, 512):
    batches = values_all(critic, prompts, answers, tiny.MODEL, batch_size=size)
    for row, length in enumerate(answers.lengths):
      np.testing.assert_allclose(
        batches[row, : length + 1], along[row, : length + 1], atol=1e-5
      )
  scores = rank_all(critic, prompts, answers, tiny.MODEL, batch_size=2)
  np.testing.assert_allclose(
    scores.ravel(), along[np.arange(4), answers.lengths], atol=1e-5
  )


def test_best_of_n_takes_the_answer_of_highest_value():
  # After 5 comes 6, 7 or 8 and the end; 7 is worth most, 0 must not be read.
  config = chain.model_config(12)
  follow = {5: [6, 7, 8], 6: [0], 7: [0], 8: [0]}
  policy = chain.make_policy(config, chain.table_logits(12, follow))
  values = np.zeros(12)
  values[[6, 7, 8, 0]] = 0.2, 0.9, 0.4, 3.0
  critic = chain.make_critic(config, values)
  out = best_of_n(
    policy,
    critic,
    [[5], [1, 5]],
    KEY,
    config,
    num_samples=16,
    eos_ids=(0,),
    max_new_tokens=3,
  )
  first = out.answers.tokens[:, 0].reshape(2, 16)
  assert set(first.ravel().tolist()) == {6, 7, 8}
  np.testing.assert_allclose(out.values, values[first], atol=1e-5)
  for row in range(2):
    assert first[row, out.choice[row]] == 7


def test_unknown_reduction_is_refused():
  with pytest.raises(ValueError, match="reduction: expected one of"):
    best_of_n(
      {},
      {},
      [[1]],
      KEY,
      tiny.MODEL,
      num_samples=1,
      eos_ids=(),
      max_new_tokens=1,
      reduction="max",
    )


@pytest.mark.parametrize(
  "answers, weights, finished, want",
  [
    (["4", "5", "4"], None, None, 0),
    (["5", "4", "4"], None, None, 1),
    # The first of equals.
    (["4", "5"], None, None, 0),
    (["4", "5", "4"], [0.1, 0.9, 0.2], None, 1),
    (["4", "5", "4"], [0.5, 0.9, 0.5], None, 0),
    # A negative weight is no vote against.
    (["4", "5", "4"], [1.0, 0.9, -5.0], None, 0),
    # No answer, no vote, unless there is none at all.
    (["", "", "7"], None, None, 2),
    (["", ""], None, None, 0),
    ([None, "", "7"], None, None, 2),
    # Zero is an answer.
    ([0, 0, 7], None, None, 0),
    # An empty answer is not elected because others weigh nothing.
    (["", "7"], [0.9, 0.0], None, 1),
    (["", "7", "8"], [0.9, -1.0, -0.5], None, 1),
    # Where no vote weighs anything, all count alike.
    (["5", "4", "4"], [-0.9, -0.5, -0.1], None, 1),
    # What was cut off has no vote, and does not stand for its group either.
    (["4", "4", "5"], None, [False, False, True], 2),
    (["4", "5", "4"], None, [False, True, True], 1),
    (["4", "5", "4", "4"], None, [False, True, True, True], 2),
    (["4", "5"], [9.0, 0.1], [False, True], 1),
    # Nothing finished: the first answer, if it is one.
    (["4", "5", "5"], None, [False, False, False], 0),
    (["", "5", "5"], None, [False, False, False], 1),
    # What finished is empty.
    (["", "5"], None, [True, False], 1),
  ],
)
def test_votes_by_hand(answers, weights, finished, want):
  assert majority_vote(answers, weights, finished) == want


def test_votes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="answers: expected at least one"):
    majority_vote([])
  with pytest.raises(ValueError, match="expected 2 weights and finished"):
    majority_vote(["4", "5"], [1.0])


def test_votes_weigh_what_reward_is_expected():
  # Rewards of 1 and 0 were trained as 1 and -1: two answers that are right one
  # time in five stand against one that is right one time in three.
  values = np.array([-0.6, -1 / 3, -0.6])
  weights = vote_weights(values, reward_scale=2.0, reward_offset=-1.0)
  np.testing.assert_allclose(weights, [0.2, 1 / 3, 0.2])
  assert majority_vote(["4", "5", "4"], weights) == 0
  assert majority_vote(["4", "5", "6"], weights) == 1
  # Below the reward of a wrong answer no one is expected to be right.
  np.testing.assert_allclose(vote_weights([-0.1, 0.7]), [0.0, 0.7])
  with pytest.raises(ValueError, match="reward_scale"):
    vote_weights(values, reward_scale=0.0)


def test_examples_in_the_documentation():
  module = importlib.import_module("oreo_jax.decode.rank")
  result = doctest.testmod(module)
  assert result.attempted and not result.failed
