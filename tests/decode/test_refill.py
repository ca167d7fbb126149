"""Slots of a search that are refilled: nothing else changes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import chain, tiny

from oreo_jax.decode import (
  Stops,
  Strategy,
  look_ahead_search,
  make_plan,
  search,
)
from oreo_jax.decode.continuous import room_for

KEY = jax.random.key(5)
VOCAB = 24
CONFIG = chain.model_config(VOCAB)
# Tokens 1 to 8 end a step.
ENDS = np.isin(np.arange(VOCAB), np.arange(1, 9))
STOPS = Stops(ENDS.astype(np.int8)[None])  # one state
LIMITS = {"max_steps": 4, "max_step_tokens": 3}


def random_plan(strategy):
  policy = tiny.draw_params(CONFIG, scale=1.5)
  critic = tiny.draw_params(CONFIG, head="value", seed=1)
  return make_plan(
    policy,
    critic,
    KEY,
    CONFIG,
    strategy=strategy,
    stops=STOPS,
    eos_ids=(chain.EOS, 9, 10),
    max_new_tokens=9,
  )


def random_prompts(count, longest):
  rng = np.random.default_rng(1)
  return [
    rng.integers(1, VOCAB, size).tolist()
    for size in rng.integers(1, longest + 1, count)
  ]


def test_slots_and_order_change_nothing():
  plan = random_plan(Strategy(beams=3, **LIMITS))
  prompts = random_prompts(13, 5)
  together = search(plan, prompts, slots=13)
  assert 1 < together.answers.finished.sum() < 13
  order = np.random.default_rng(2).permutation(13)
  for slots in (2, 5):
    done, results = [], {}
    apart = search(
      plan,
      [prompts[place] for place in order],
      problems=order,
      slots=slots,
      on_progress=done.append,
      on_result=results.__setitem__,
    )
    for name in ("tokens", "lengths", "finished"):
      np.testing.assert_array_equal(
        getattr(apart.answers, name), getattr(together.answers, name)[order]
      )
    np.testing.assert_array_equal(apart.proposed, together.proposed[order])
    np.testing.assert_allclose(apart.values, together.values[order], atol=1e-5)
    assert sum(done) == 13
    assert sorted(results) == list(range(13))
    for place, result in results.items():
      assert result.values[0] == apart.values[place]


def test_room_that_grows_with_the_answers_changes_nothing(monkeypatch):
  module = importlib.import_module("oreo_jax.decode.search")
  plan = random_plan(Strategy(beams=3, **LIMITS))
  prompts = random_prompts(13, 5)
  at_once = search(plan, prompts, slots=5)
  # Some answers have all of the 9 tokens, and some leave room.
  assert at_once.answers.lengths.min() < 6 < at_once.answers.lengths.max()
  rooms, widen = [], module.widen

  def noted(state, *, room):
    rooms.append((state.tokens.shape[1], room))
    return widen(state, room=room)

  monkeypatch.setattr(module, "_FIRST_ROOM", 1)
  monkeypatch.setattr(module, "widen", noted)
  grown = search(plan, prompts, slots=5)
  # At first there is room for a step, and not for more than an answer may have.
  assert rooms == [(3, 6), (6, 9)]
  for name in ("tokens", "lengths", "finished"):
    np.testing.assert_array_equal(
      getattr(grown.answers, name), getattr(at_once.answers, name)
    )
  np.testing.assert_array_equal(grown.proposed, at_once.proposed)
  np.testing.assert_allclose(grown.values, at_once.values, atol=1e-5)
  np.testing.assert_allclose(
    grown.answers.logps, at_once.answers.logps, atol=1e-5
  )


@pytest.mark.slow
def test_draws_of_a_tree_depend_on_the_question_alone():
  plan = random_plan(look_ahead_search(2, 2, prior_weight=0.1, **LIMITS))
  prompts = random_prompts(5, 5)
  together = search(plan, prompts, slots=5)
  apart = search(plan, prompts[3:], problems=[3, 4], slots=1)
  np.testing.assert_array_equal(
    apart.answers.tokens, together.answers.tokens[3:]
  )
  np.testing.assert_allclose(apart.scores, together.scores[3:], atol=1e-5)


def test_programs_are_compiled_once():
  module = importlib.import_module("oreo_jax.decode.search")
  for program in (
    module.start_slots,
    module.admit_questions,
    module.search_round,
  ):
    program.clear_cache()
  plan = random_plan(Strategy(beams=2, **LIMITS))
  # Lengths 1 to 40 make the buckets 16, 32 and the 48 of the room.
  prompts = random_prompts(30, 40)
  assert {min(room_for(len(prompt)), 48) for prompt in prompts} == {16, 32, 48}
  search(plan, prompts, slots=4, prompt_length=48)
  search(plan, prompts[::-1], slots=4, prompt_length=48)
  assert module.start_slots._cache_size() == 1
  assert module.admit_questions._cache_size() == 3
  assert module.search_round._cache_size() == 1


def test_a_score_that_excludes_everything_leaves_no_answer():
  def nothing(candidates):
    return jnp.full_like(candidates.values, -jnp.inf)

  plan = random_plan(Strategy(beams=2, score=nothing, **LIMITS))
  out = search(plan, [[3], [4]])
  assert out.answers.lengths.tolist() == [0, 0]
  assert (out.scores == -np.inf).all()
