"""Conversations over kept caches are those that read every text anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.decode import (
  Strategy,
  best_of_actions,
  by_logp,
  make_plan,
  no_stops,
)
from oreo_jax.decode.generate import Generation, run_batch
from oreo_jax.decode.sampling import ANCESTRAL, row_keys, sampling_rows
from oreo_jax.decode.turns import Conversations, act, observe
from oreo_jax.decode.values import answer_values

KEY = jax.random.key(3)
EOS = 1
MOST_ACTION, MOST = 5, 60
TURNS = 4
CONFIG = tiny.MODEL


def plan_of(policy, critic, config, count, most=MOST, level="token"):
  strategy = best_of_actions(
    count,
    max_steps=100,
    max_step_tokens=MOST_ACTION,
    **({} if critic is not None else {"score": by_logp}),
  )
  return make_plan(
    policy,
    critic,
    KEY,
    config,
    strategy=strategy,
    # Nothing but its end ends an action.
    stops=no_stops(config.vocab_size),
    eos_ids=(EOS,),
    max_new_tokens=most,
    granularity=level,
  )


def answer_of(number, turn, action):
  """What the environment says: it depends on all that was said to it."""
  seed = [number, turn, *(int(token) for token in action)]
  rng = np.random.default_rng(seed)
  return rng.integers(2, CONFIG.vocab_size, rng.integers(1, 19)).astype("i4")


def beginning(number):
  rng = np.random.default_rng(100 + number)
  return rng.integers(2, CONFIG.vocab_size, rng.integers(1, 8)).astype("i4")


def turns_of(number):
  """How many turns a conversation has."""
  return 1 + number % TURNS


def play(plan, numbers, slots):
  """Plays conversations; returns a list of (action, value, logps) of each."""
  conversations = Conversations(plan, slots, prompt_room=8)
  queue, owner, said = list(numbers), {}, {number: [] for number in numbers}
  while queue or owner:
    free = [s for s in range(conversations.slots) if s not in owner]
    entering = dict(zip(free, queue, strict=False))
    queue = queue[len(entering) :]
    if entering:
      conversations.begin(
        list(entering),
        [beginning(number) for number in entering.values()],
        list(entering.values()),
      )
      owner.update(entering)
    heard = {}
    for slot, action in conversations.act().items():
      number = owner[slot]
      assert action.turn == len(said[number])
      said[number].append(action)
      if len(said[number]) < turns_of(number):
        answer = answer_of(number, action.turn, action.tokens)
        assert conversations.has_room(slot, len(answer))
        heard[slot] = answer
      else:
        del owner[slot]
    conversations.observe(heard)
  return said


def play_alone(policy, critic, config, number, count, level="token"):
  """The same by programs that read the whole text for every action."""
  text, said = beginning(number), []
  for turn in range(turns_of(number)):
    places = turn * count + np.arange(count, dtype=np.int32)
    out = run_batch(
      policy,
      text[None],
      np.array([len(text)], np.int32),
      row_keys(KEY, np.full(count, number, np.int32), places),
      sampling_rows([ANCESTRAL] * count),
      config=config,
      eos_ids=(EOS,),
      max_new_tokens=MOST_ACTION,
    )
    answers = Generation(*(np.asarray(x) for x in out))
    best, value = 0, np.nan
    if critic is not None:
      along = answer_values(critic, [text], answers, config)
      # At the state before the end of the turn, where there is one. At turn
      # level an action that was cut is read where it began.
      last = answers.lengths - answers.finished
      if level == "turn":
        last = np.where(answers.finished, last, 0)
      read = along[np.arange(count), last]
      best = int(np.argmax(read))
      value = read[best]
    elif count > 1:
      inside = np.arange(MOST_ACTION)[None] < answers.lengths[:, None]
      best = int(np.argmax(np.where(inside, answers.logps, 0).sum(axis=1)))
    action = answers.tokens[best, : answers.lengths[best]]
    said.append((action, value, answers.logps[best, : len(action)]))
    text = np.concatenate([text, action, answer_of(number, turn, action)])
  return said


def assert_same(said, policy, critic, config, count, level="token"):
  ends = set()
  for number, actions in said.items():
    alone = play_alone(policy, critic, config, number, count, level)
    assert len(actions) == len(alone)
    for action, (tokens, value, logps) in zip(actions, alone, strict=True):
      np.testing.assert_array_equal(action.tokens, tokens)
      np.testing.assert_allclose(action.value, value, atol=2e-5)
      np.testing.assert_allclose(action.logps, logps, atol=2e-5)
      assert action.finished == (tokens[-1] == EOS)
      ends.add(action.finished)
  assert ends == {True, False}


@pytest.fixture(scope="module")
def networks():
  return tiny.draw_params(), tiny.draw_params(head="value")


@pytest.mark.parametrize(
  ("count", "judged"),
  [
    (3, True),
    pytest.param(1, False, marks=pytest.mark.slow),
    pytest.param(1, True, marks=pytest.mark.slow),
    pytest.param(3, False, marks=pytest.mark.slow),
  ],
)
def test_conversations_are_those_that_read_every_text_anew(
  networks, count, judged
):
  policy, critic = networks
  critic = critic if judged else None
  plan = plan_of(policy, critic, CONFIG, count)
  assert_same(play(plan, range(7), 3), policy, critic, CONFIG, count)


@pytest.mark.slow
def test_a_critic_of_turn_level_is_read_where_it_was_trained(networks):
  plan = plan_of(*networks, CONFIG, 3, level="turn")
  said = play(plan, range(7), 3)
  assert_same(said, *networks, CONFIG, 3, level="turn")


@pytest.mark.slow
def test_layers_apart_and_a_critic_on_the_policys_layers(networks):
  policy, _ = networks
  critic = models.value_params(policy, CONFIG)
  head = np.random.default_rng(0).normal(size=critic["value_head"].shape)
  critic["value_head"] = jnp.asarray(head, "float32")
  plain = plan_of(policy, critic, CONFIG, 3)
  (ours, config), (theirs, _) = (
    models.unstack_layers(each, CONFIG) for each in (policy, critic)
  )
  shared = plan_of(ours, models.share_trunk(theirs, ours), config, 3)
  assert shared.shared_layers == CONFIG.num_layers - 1
  for plan in (plain, shared):
    assert_same(play(plan, range(5), 3), policy, critic, CONFIG, 3)


@pytest.mark.slow
def test_any_slots_order_and_devices_give_the_same(networks):
  policy, critic = networks
  plan = plan_of(policy, critic, CONFIG, 3)
  want = play(plan, range(9), 9)
  mesh = tiny.mesh(data=8)
  with jax.set_mesh(mesh):
    split = plan_of(
      tiny.place(policy, CONFIG, mesh),
      tiny.place(critic, CONFIG, mesh, head="value"),
      CONFIG,
      3,
    )
    on_eight = play(split, range(9), 5)
  for said in (play(plan, range(8, -1, -1), 2), on_eight):
    for number, actions in want.items():
      for one, two in zip(actions, said[number], strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_allclose(one.value, two.value, atol=2e-5)


@pytest.mark.slow
def test_room_grows_and_ends(networks, monkeypatch):
  policy, critic = networks
  plan = plan_of(policy, critic, CONFIG, 2, most=64)
  want = play(plan, range(6), 6)
  monkeypatch.setattr("oreo_jax.decode.turns._FIRST_ROOM", 8)
  for program in (act, observe):
    program.clear_cache()
  said = play(plan, range(6), 6)
  for number, actions in want.items():
    for one, two in zip(actions, said[number], strict=True):
      np.testing.assert_array_equal(one.tokens, two.tokens)
  # 8, 16, 32 and 64 tokens, each for observations of 16 and 32 at most.
  assert act._cache_size() <= 4 and observe._cache_size() <= 8
  conversations = Conversations(plan, 1, prompt_room=8)
  conversations.begin([0], [beginning(0)], [0])
  assert conversations.has_room(0, 62) and not conversations.has_room(0, 63)


def test_several_beams_are_refused(networks):
  plan = plan_of(*networks, CONFIG, 2)
  with pytest.raises(ValueError, match="beams: expected 1"):
    Conversations(
      make_plan(
        *networks,
        KEY,
        CONFIG,
        strategy=Strategy(beams=2),
        stops=plan.stops,
        eos_ids=(EOS,),
        max_new_tokens=9,
      ),
      1,
      8,
    )
