"""Episodes with an environment: exact to the token, the same in any slots."""

import dataclasses

import jax
import numpy as np
import pytest
from oracles import templates, tiny

from oreo_jax import data
from oreo_jax.config import DataConfig
from oreo_jax.decode import (
  Conversations,
  best_of_actions,
  make_plan,
  no_stops,
)
from oreo_jax.rollout import Codec, Start, play_episodes
from oreo_jax.settings import ConfigError
from oreo_jax.tasks import Problem
from oreo_jax.tasks.environment import Environment, Step
from oreo_jax.tasks.environment_pool import EnvironmentPool
from oreo_jax.tasks.vocabulary import make_character_tokenizer

MOST_ACTION = 12
# A character a token, so that a random policy often draws the end of a turn.
TOKENIZER = make_character_tokenizer("abcdehnrstuio G0123456789")
TOKENIZER.add_special_tokens(
  {"additional_special_tokens": templates.SPECIAL[:2]}
)
TOKENIZER.chat_template = templates.CHATML
CODEC = Codec.make(TOKENIZER, DataConfig(chat=True), len(TOKENIZER))
CONFIG = dataclasses.replace(tiny.MODEL, vocab_size=len(TOKENIZER))


class Echo(Environment):
  """Says back how long the action was; is over after some turns."""

  def reset(self, problem):
    self.left, self.heard = int(problem.answer), 0
    return f"Go {problem.prompt}"

  def step(self, action):
    if action == "crash":
      raise RuntimeError("it broke")
    self.left -= 1
    self.heard += len(action)
    return Step(f"heard {self.heard}", float(self.heard % 2), self.left == 0)


class Fragile(Echo):
  """Breaks in the second turn of one problem."""

  def reset(self, problem):
    self.breaks = problem.id == "p2"
    return super().reset(problem)

  def step(self, action):
    if self.breaks and self.heard:
      raise RuntimeError("it broke")
    return super().step(action or "?")


STARTS = [
  Start(n, Problem(f"p{n}", "ab" * n, str(1 + n % 4)), f"p{n}/0")
  for n in range(7)
]


def play(starts=STARTS, *, slots=3, make=Echo, most=600, turns=9, count=2):
  plan = make_plan(
    tiny.draw_params(CONFIG, scale=0.5),
    tiny.draw_params(CONFIG, head="value"),
    jax.random.key(0),
    CONFIG,
    strategy=best_of_actions(count, max_steps=99, max_step_tokens=MOST_ACTION),
    stops=no_stops(CONFIG.vocab_size),
    eos_ids=CODEC.end_ids,
    max_new_tokens=most,
  )
  conversations = Conversations(plan, slots, prompt_room=64)
  with EnvironmentPool(make, slots=conversations.slots) as pool:
    episodes = play_episodes(
      starts, conversations, pool, CODEC, max_turns=turns
    )
    return {each.start.number: each for each in episodes}


@pytest.fixture(scope="module")
def episodes():
  return play()


def test_episodes_end_as_the_environment_says(episodes):
  assert sorted(episodes) == list(range(7))
  for number, episode in episodes.items():
    chat = episode.trajectory
    assert episode.reason == "done"
    assert len(chat.actions) == len(episode.values) == 1 + number % 4
    assert chat.turns[0].content == "Go " + "ab" * number
    heard = 0
    rewards = []
    for turn, then in zip(
      chat.turns[1::2], [*chat.turns[2::2], None], strict=True
    ):
      heard += len(turn.content)
      rewards.append(float(heard % 2))
      assert then is None or then.content == f"heard {heard}"
    assert chat.reward == sum(rewards) == episode.reward
    if chat.turn_rewards is not None:
      assert list(chat.turn_rewards) == rewards
    assert np.isfinite(episode.values).all()


def test_training_has_the_tokens_that_were_played(episodes):
  ended = set()
  for episode in episodes.values():
    chat = episode.trajectory
    tokenized = data.tokenize_trajectory(chat, TOKENIZER)
    sampled = np.concatenate([turn.tokens for turn in chat.sampled])
    actions = tokenized.tokens[tokenized.action_mask]
    np.testing.assert_array_equal(actions, sampled)
    logps = np.concatenate([turn.logps for turn in chat.sampled])
    kept = tokenized.extras["behaviour_logps"][tokenized.action_mask]
    np.testing.assert_array_equal(kept, logps)
    # The beginning is the prompt that was played, template and all.
    prompt = data.tokenize_prompt(list(chat.turns[:1]), TOKENIZER)
    np.testing.assert_array_equal(tokenized.tokens[: len(prompt)], prompt)
    ended |= {int(turn.tokens[-1]) in CODEC.end_ids for turn in chat.sampled}
  assert ended == {True, False}


@pytest.mark.slow
def test_slots_and_restarts_change_nothing(episodes):
  some = play(STARTS[::-1][:4], slots=2)
  for number, episode in some.items():
    assert episode.trajectory.turns == episodes[number].trajectory.turns


@pytest.mark.slow
def test_limits_of_turns_and_tokens_end_an_episode():
  few = play(STARTS[2:4], turns=2)
  assert {each.reason for each in few.values()} == {"turns"}
  assert all(len(each.values) == 2 for each in few.values())
  short = play(STARTS[3:4], most=60)
  assert short[3].reason == "tokens" and 0 < len(short[3].values) < 4


def test_a_lost_episode_is_told_and_the_others_go_on():
  played = play(STARTS[:4], make=Fragile)
  assert played[2].reason == "lost" and played[2].trajectory is None
  assert {played[n].reason for n in (0, 1, 3)} == {"done"}


def test_plain_text_is_refused():
  plain = dataclasses.replace(CODEC, chat=False)
  with pytest.raises(ConfigError, match="data.chat=True"):
    next(play_episodes([], None, None, plain, max_turns=1))
