"""The house: rules, expert, splits, vocabulary, copies, determinism."""

import pathlib
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from oreo_jax import data
from oreo_jax.config import DataConfig
from oreo_jax.rollout.codec import Codec
from oreo_jax.tasks import AgentTask, Problem, Task, get_task
from oreo_jax.tasks.environment_pool import EnvironmentPool
from oreo_jax.tasks.house import world
from oreo_jax.tasks.house.world import Goal, HouseEnvironment, Layout

HERE = pathlib.Path(__file__).parents[2]

PLACES = {
  "table": ["apple", "cup"],
  "drawer": ["letter"],
  "shelf": ["egg", "map", "card"],
  "fridge": ["egg"],
  "stove": [],
  "sink": ["plate"],
  "bin": [],
}


def begin(goal, max_turns=99):
  environment = HouseEnvironment(max_turns=max_turns)
  layout = Layout(goal, PLACES, "table")
  observation = environment.reset(Problem("x", layout.prompt, layout.dump()))
  return environment, observation


# Goal, actions with what is answered, reward at the end.
EPISODES = [
  (
    Goal("apple", "drawer", "hot"),
    "goal put hot apple in drawer",
    [
      ("open drawer", "nothing happens"),
      ("go to drawer", "drawer is closed"),
      ("take letter from drawer", "nothing happens"),
      ("open drawer", "in drawer you see letter"),
      ("open drawer", "nothing happens"),
      ("go to drawer", "nothing happens"),
      ("go to table", "on table you see lamp apple cup"),
      ("take lamp from table", "nothing happens"),
      ("take egg from table", "nothing happens"),
      ("take apple from shelf", "nothing happens"),
      ("take apple from table", "you have apple"),
      ("take cup from table", "nothing happens"),
      ("heat apple", "nothing happens"),
      ("go to stove", "on stove you see nothing"),
      ("heat cup", "nothing happens"),
      ("heat apple", "apple is hot"),
      ("put apple in drawer", "nothing happens"),
      ("go to drawer", "in drawer you see letter"),
      ("put apple on drawer", "nothing happens"),
      ("put letter in drawer", "nothing happens"),
      ("put apple in drawer", "hot apple is in drawer"),
    ],
    1.0,
  ),
  (
    Goal("egg", "table", "", 2),
    "goal put two egg on table",
    [
      ("go to shelf", "on shelf you see egg map card"),
      ("take egg from shelf", "you have egg"),
      ("go to table", "on table you see lamp apple cup"),
      ("put egg on table", "egg is on table"),
      ("go to fridge", "fridge is closed"),
      ("open fridge", "in fridge you see egg"),
      ("take egg from fridge", "you have egg"),
      ("cool egg", "egg is cold"),
      ("go to table", "on table you see lamp apple cup egg"),
      ("put egg on table", "table is full"),
      ("go to bin", "in bin you see nothing"),
      ("put egg in bin", "egg is gone"),
      ("go to table", "on table you see lamp apple cup egg"),
      ("take cup from table", "you have cup"),
      ("go to shelf", "on shelf you see map card"),
      ("put cup on shelf", "cup is on shelf"),
      ("go to sink", "on sink you see plate"),
      ("take plate from sink", "you have plate"),
      ("wash plate", "plate is clean"),
      ("go to shelf", "on shelf you see map card cup"),
      ("put plate on shelf", "plate falls and breaks"),
      ("take plate from shelf", "you have broken plate"),
    ],
    0.0,
  ),
  (
    Goal("cup", "drawer", "cold"),
    "goal put cold cup in drawer",
    [
      ("go to table", "on table you see lamp apple cup"),
      ("take cup from table", "you have cup"),
      ("go to fridge", "fridge is closed"),
      ("cool cup", "cup is cold"),
      ("go to drawer", "drawer is closed"),
      ("open drawer", "cup falls and breaks"),
      ("take cup from drawer", "you have broken cup"),
      ("put cup in drawer", "broken cup is in drawer"),
    ],
    0.0,
  ),
  (
    Goal("cup", "shelf", "hot"),
    "goal put hot cup on shelf",
    [
      ("go to table", "on table you see lamp apple cup"),
      ("take cup from table", "you have cup"),
      ("go to stove", "on stove you see nothing"),
      ("heat cup", "cup is hot"),
      ("go to fridge", "fridge is closed"),
      ("cool cup", "cup is broken"),
      ("go to stove", "on stove you see nothing"),
      ("heat cup", "cup is broken"),
    ],
    0.0,
  ),
  (
    Goal("map", "lamp"),
    "goal look at map under lamp",
    [
      ("use lamp", "nothing happens"),
      ("go to table", "on table you see lamp apple cup"),
      ("use lamp", "lamp is on"),
      ("take apple from table", "you have apple"),
      ("use lamp", "you look at apple under lamp"),
      ("eat apple", "apple is gone"),
      ("go to shelf", "on shelf you see egg map card"),
      ("take map from shelf", "you have map"),
      ("eat map", "nothing happens"),
      ("go to table", "on table you see lamp cup"),
      ("use lamp", "you look at map under lamp"),
    ],
    1.0,
  ),
  (
    Goal("card", "lamp"),
    "goal look at card under lamp",
    [
      ("go to shelf", "on shelf you see egg map card"),
      ("take card from shelf", "you have card"),
      ("tear card", "card is torn"),
      ("go to table", "on table you see lamp apple cup"),
      ("use lamp", "you look at torn card under lamp"),
      ("put card on table", "torn card is on table"),
      ("take cup from table", "you have cup"),
      ("drop cup", "cup falls and breaks"),
      ("drop cup", "nothing happens"),
    ],
    0.0,
  ),
  (
    Goal("letter", "bin"),
    "goal put letter in bin",
    [
      ("", "nothing happens"),
      ("go to attic", "nothing happens"),
      ("GO TO TABLE", "nothing happens"),
      ("go to table and shelf", "nothing happens"),
      ("\ud800 \x00\n", "nothing happens"),
      ("x " * 10_000, "nothing happens"),
    ],
    0.0,
  ),
]


@pytest.mark.parametrize("goal, told, played, reward", EPISODES)
def test_rules_by_hand(goal, told, played, reward):
  environment, observation = begin(goal)
  assert observation == f"{told} you see {' '.join(PLACES)}"
  for number, (action, answer) in enumerate(played, start=1):
    step = environment.step(action)
    assert (number, action, step.observation) == (number, action, answer)
    last = number == len(played)
    assert (step.reward, step.done) == (
      (reward, bool(reward)) if last else (0, False)
    )


def test_burns_and_soaks():
  for name, verb, ruined in [
    ("apple", "heat heat", "burnt"),
    ("apple", "heat cool", "cold"),
    ("apple", "wash", "clean"),
    ("map", "heat", "burnt"),
    ("map", "wash heat", "wet"),
    ("map", "cool", "cold"),
    ("cup", "cool heat", "broken"),
    ("cup", "heat wash cool", "cold"),
    ("cup", "heat heat", "broken"),
  ]:
    thing = world.Thing(name)
    for word in verb.split():
      thing = thing.treated(word)
    assert thing == (name, ruined)


def test_the_limit_of_turns_ends_it_without_a_reward():
  environment, _ = begin(Goal("apple", "drawer"), max_turns=2)
  assert not environment.step("go to table").done
  assert environment.step("go to sink") == ("on sink you see plate", 0.0, True)


def test_the_last_turn_may_win():
  environment, _ = begin(Goal("card", "lamp"), max_turns=4)
  for action in ["go to shelf", "take card from shelf", "go to table"]:
    assert not environment.step(action).done
  assert environment.step("use lamp")[1:] == (1.0, True)


@pytest.fixture(scope="module")
def task():
  return get_task("house")


@pytest.fixture(scope="module")
def episodes(task):
  """(problem, turns, reward) of careful, noisy and lost players."""
  problems = task.problems("train", 300)
  draw = random.Random(3)
  return [
    (problem, *task.play_expert(problem, draw, noise))
    for noise in (0.0, 0.4, 1.0)
    for problem in problems
  ]


def test_it_is_a_task_with_an_environment(task):
  assert isinstance(task, Task) and isinstance(task, AgentTask)
  assert not isinstance(get_task("maze"), AgentTask)
  assert task.max_turns == 16


def goal_is_reached(problem, environment, actions):
  """Looks at the words of the goal and the state, and shares no code."""
  words = problem.prompt.partition(" you see ")[0].split()[1:]
  spoilt = {"burnt", "broken", "wet", "torn"}
  if words[0] == "look":
    return (
      actions[-1] == "use lamp"
      and environment.held is not None
      and environment.held.name == words[2]
      and environment.held.state not in spoilt
    )
  *adjective, name, _, place = words[1:]
  states = [t.state for t in environment.things[place] if t.name == name]
  good = [state for state in states if state not in spoilt]
  if adjective == ["two"]:
    return len(good) >= 2
  return (adjective[0] in good) if adjective else bool(good)


def test_rewards_are_exact(task, episodes):
  environment = task.make_environment()
  rewards = []
  for problem, turns, reward in episodes:
    actions = [turn.content for turn in turns[1::2]]
    assert environment.reset(problem) == turns[0].content == problem.prompt
    for number, action in enumerate(actions, start=1):
      step = environment.step(action)
      reached = goal_is_reached(problem, environment, actions[:number])
      assert step.reward == reached
      assert step.done == (number == len(actions)) == (reached or number == 16)
    assert step.reward == reward
    rewards.append(reward)
  responses = ["\n".join(t.content for t in e[1][1::2]) for e in episodes]
  graded = task.grade([e[0] for e in episodes], responses)
  assert graded.dtype == np.float32 and graded.tolist() == rewards
  assert 0.3 < np.mean(rewards) < 0.9


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_careful_expert_solves_all(task, split):
  turns = [
    task.play_expert(problem, random.Random(0), 0.0)
    for problem in task.problems(split, 300)
  ]
  assert all(reward == 1.0 for _, reward in turns)
  assert 7.5 < np.mean([len(said) // 2 for said, _ in turns]) < 9


def test_the_expert_is_told_nothing_but_observations(task):
  """The same text leads to the same actions, whatever else is in the room."""
  from oreo_jax.tasks.house.expert import Expert

  for problem, turns, _ in [
    (p, *task.play_expert(p, random.Random(0), 0.0))
    for p in task.problems("test", 50)
  ]:
    expert = Expert(problem.prompt)
    said = [turn.content for turn in turns]
    for action, observation in zip(said[1::2], said[2::2], strict=False):
      assert expert.act() == action
      expert.hear(action, observation)
    assert expert.act() == said[-1]


@pytest.mark.parametrize(
  "noise, low, high", [(0.2, 0.83, 0.91), (0.4, 0.6, 0.7)]
)
def test_success_of_the_noisy_expert(task, noise, low, high):
  draw = random.Random(5)
  rewards = [
    task.play_expert(problem, draw, noise)[1]
    for problem in task.problems("train", 1200)
  ]
  assert low < np.mean(rewards) < high


def test_most_lost_episodes_could_have_been_won_and_many_were_doomed(
  task, episodes
):
  """Turns can be wasted, and some mistakes are for good."""
  doomed = lost = 0
  environment = task.make_environment()
  for problem, turns, reward in episodes[300:600]:
    if reward:
      continue
    lost += 1
    environment.reset(problem)
    for turn in turns[1::2]:
      environment.step(turn.content)
    goal = environment.layout.goal
    things = [t for there in environment.things.values() for t in there]
    things += [environment.held] if environment.held else []
    fit = [
      t for t in things if t.name == goal.name and t.state not in world.RUINED
    ]
    doomed += len(fit) < goal.copies
  assert 0.15 * lost < doomed < 0.6 * lost


def test_admissible_actions_are_those_that_do_something(task):
  draw = random.Random(1)
  invalid = 0
  for problem in task.problems("validation", 40):
    environment = task.make_environment()
    environment.reset(problem)
    done = False
    while not done:
      listed = environment.actions()
      assert len(set(listed)) == len(listed)
      for action in listed:
        assert environment.copy().step(action).observation != world.INVALID
      others = [
        f"{verb} {name}"
        for verb in ("eat", "drop", "tear", "heat", "wash", "cool")
        for name in world.KIND
      ]
      others += [f"open {place}" for place in environment.things] + ["use lamp"]
      for place in environment.things:
        others += [f"take {name} from {place}" for name in world.KIND]
        others += [
          f"put {n} {w} {place}" for n in world.KIND for w in ("in", "on")
        ]
      for action in set(others) - set(listed):
        invalid += 1
        assert environment.copy().step(action).observation == world.INVALID
      done = environment.step(draw.choice(listed)).done
  assert invalid > 10_000


def test_a_copy_is_independent(task):
  draw = random.Random(2)
  for problem in task.problems("train", 60):
    one = task.make_environment()
    one.reset(problem)
    for _ in range(draw.randrange(12)):
      one.step(draw.choice(one.actions()))
    two, three = one.copy(), one.copy()
    steps = []
    for _ in range(6):
      action = draw.choice(two.actions())
      steps.append((action, two.step(action)))
    before = [three.actions(), three.things, three.held, three.turns]
    assert before == [one.actions(), one.things, one.held, one.turns]
    for action, step in steps:
      assert one.step(action) == step
    assert before == [three.actions(), three.things, three.held, three.turns]


def room_of(problem):
  layout = Layout.load(problem.answer)
  return frozenset(layout.places)


def test_no_room_is_in_two_splits_whatever_the_seed():
  rooms = {
    split: {
      room_of(problem)
      for seed in (0, 7)
      for problem in get_task("house", seed=seed).problems(split, 600)
    }
    for split in ("train", "validation", "test")
  }
  assert all(len(some) > 150 for some in rooms.values())
  assert not rooms["train"] & (rooms["validation"] | rooms["test"])
  assert not rooms["validation"] & rooms["test"]


def test_problems_are_distinct_and_a_prefix_of_more(task):
  problems = task.problems("test", 400)
  assert problems[:100] == task.problems("test", 100)
  assert (
    len({p.answer for p in problems}) == len({p.id for p in problems}) == 400
  )
  assert [p for p, _ in task.demonstrations(9)] == task.problems("train", 9)


def test_all_kinds_of_goal_come_equally_often(task):
  kinds = [
    (goal.place == "lamp", goal.state, goal.copies)
    for goal in (
      Layout.load(p.answer).goal for p in task.problems("validation", 120)
    )
  ]
  assert len(set(kinds)) == 6
  assert all(kinds.count(kind) == 20 for kind in set(kinds))


def test_no_problem_begins_solved_or_with_the_goal_in_place(task):
  environment = task.make_environment()
  for problem in task.problems("train", 300):
    environment.reset(problem)
    goal = environment.layout.goal
    assert not environment.is_won()
    if goal.place != "lamp":
      there = environment.things[goal.place]
      assert goal.name not in [thing.name for thing in there]
      assert len(there) + goal.copies <= world.ROOM_FOR


CODE = """
from oreo_jax.tasks import get_task
task = get_task("house", seed=3)
text = repr(task.problems("test", 50)) + repr(task.demonstrations(50))
"""


def test_problems_and_demonstrations_are_the_same_in_every_process():
  scope = {}
  exec(CODE, scope)
  for hash_seed in ("1", "2"):
    printed = subprocess.run(
      [sys.executable, "-c", CODE + "print(text)"],
      env={"PYTHONPATH": str(HERE), "PYTHONHASHSEED": hash_seed},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    assert printed == scope["text"] + "\n"
  assert (
    repr(get_task("house", seed=4).problems("test", 50)) not in scope["text"]
  )


def test_words_and_lengths(task, episodes):
  tokenizer = task.make_tokenizer()
  assert len(tokenizer) == 4 + len(set(world.WORDS)) == 4 + len(world.WORDS)
  assert len(tokenizer) <= 100
  lengths = []
  for _, turns, _ in episodes:
    for turn in turns:
      ids = tokenizer(turn.content).input_ids
      assert tokenizer.unk_token_id not in ids
      assert tokenizer.decode(ids) == turn.content
      limit = (
        6 if turn.role == "assistant" else 16 if turn is not turns[0] else 24
      )
      assert len(ids) <= limit
    messages = [turn.message() for turn in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    lengths.append(len(tokenizer(text).input_ids))
  assert max(lengths) <= 200


def test_conversations_are_trained_on_word_for_word(task):
  tokenizer = task.make_tokenizer()
  codec = Codec.make(tokenizer, DataConfig(chat=True), len(tokenizer))
  assert codec.end_ids == (tokenizer.eos_token_id,)
  problem, turns = task.demonstrations(3)[2]
  (sequence,) = codec.tokenize([codec.trajectory(problem, turns, 1.0)])
  actions = [turn.content for turn in turns if turn.role == "assistant"]
  assert tokenizer.decode(sequence.tokens[sequence.action_mask]) == (
    " <eos> ".join(actions) + " <eos>"
  )
  said = [turn.content for turn in turns if turn.role == "user"]
  assert tokenizer.decode(sequence.tokens[~sequence.action_mask]) == (
    "\n".join(said) + "\n"
  )
  # What is encoded bit by bit while it is played is the same.
  prompt = data.tokenize_prompt(turns[:1], tokenizer)
  bits = [prompt.tolist()]
  for turn in turns[1:]:
    end = "<eos>" if turn.role == "assistant" else "\n"
    bits.append(tokenizer(turn.content + end).input_ids)
  assert sum(bits, []) == sequence.tokens.tolist()


def test_a_conversation_needs_a_chat_template(task):
  tokenizer = task.make_tokenizer()
  codec = Codec.make(tokenizer, DataConfig(), len(tokenizer))
  with pytest.raises(ValueError, match="set --config.data.chat=True"):
    codec.trajectory(*task.demonstrations(1)[0], 1.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pool_plays_as_one_environment_does(task, episodes, workers):
  played = dict(enumerate(episodes[280:320]))
  with EnvironmentPool(
    task.make_environment, slots=len(played), workers=workers
  ) as pool:
    steps = pool.start({n: problem for n, (problem, _, _) in played.items()})
    for turn in range(0, 99, 2):
      for number, step in steps.items():
        _, turns, reward = played[number]
        last = turn == len(turns)
        assert step.done == last
        assert step.reward == (reward if last else 0.0)
        assert last or step.observation == turns[turn].content
      actions = {
        number: played[number][1][turn + 1].content
        for number, step in steps.items()
        if not step.done
      }
      if not actions:
        break
      steps = pool.step(actions)
    assert not pool.lost and pool.free == len(played)


def test_what_workers_are_sent_is_small(task):
  task.problems("train", 10)
  assert len(pickle.dumps(task.make_environment)) < 1000


def test_bad_options():
  for options, message in [
    ({"max_turns": 7}, "max_turns must be 8 or more"),
    ({"expert_noise": 1.5}, "expert_noise is a probability"),
    ({"size": 3}, "bad options for task 'house'"),
  ]:
    with pytest.raises(ValueError, match=message):
      get_task("house", **options)
  with pytest.raises(ValueError, match="not a layout of the house"):
    get_task("house").make_environment().reset(Problem("x", "", "?"))
