"""The task `house`: rooms, goals, demonstrations and rewards."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from oreo_jax.data.schema import ASSISTANT, Turn
from oreo_jax.tasks.house.expert import Expert, habit, noisy_action
from oreo_jax.tasks.house.world import (
  CLOSED_PLACES,
  DISHES,
  FIXED_PLACES,
  FOODS,
  KIND,
  OPEN_PLACES,
  PAPERS,
  ROOM_FOR,
  WORDS,
  Goal,
  HouseEnvironment,
  Layout,
)
from oreo_jax.tasks.splits import text_split
from oreo_jax.tasks.task import Problem, check_pairs, check_split
from oreo_jax.tasks.vocabulary import make_word_tokenizer

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

GOALS = ("put", "hot", "clean", "cold", "two", "look")

# An observation ends with a line break, an action with the end token.
CHAT_TEMPLATE = (
  "{% for message in messages %}{{ message.content }}"
  "{{ eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class HouseTask:
  """Rooms, goals, expert and environment (see the package's docstring).

  Attributes:
    max_turns: actions an episode may have. Every problem can be solved within
      it by looking for things where they usually are.
    expert_noise: how often, in a turn, the expert of the demonstrations forgets
      what it saw or does something without a reason.
    seed: problems and expert are functions of it. A room belongs to the same
      split whatever the seed.
    train_size: problems of the train split when no count is given.
    validation_size: the same for validation.
    test_size: the same for test.
    demonstration_count: conversations when no count is given.
  """

  max_turns: int = 16
  expert_noise: float = 0.4
  seed: int = 0
  train_size: int = 10_000
  validation_size: int = 500
  test_size: int = 1_000
  demonstration_count: int = 5_000
  name: str = dataclasses.field(default="house", init=False)

  def __post_init__(self) -> None:
    if self.max_turns < 8:
      raise ValueError(
        f"house max_turns must be 8 or more, or hardly a problem can be "
        f"solved; got {self.max_turns}"
      )
    if not 0.0 <= self.expert_noise <= 1.0:
      raise ValueError(
        f"house expert_noise is a probability; got {self.expert_noise}"
      )

  def problems(self, split: str, count: int | None = None) -> list[Problem]:
    """Returns the first `count` problems of a split (see `Task`)."""
    check_split(split)
    if count is None:
      count = getattr(self, f"{split}_size")
    return list(itertools.islice(self._draw_problems(split), count))

  def demonstrations(
    self, count: int | None = None
  ) -> list[tuple[Problem, tuple[Turn, ...]]]:
    """Returns how the noisy expert plays the first `count` train problems.

    It does not always win, and the conversation does not say whether it did.
    """
    if count is None:
      count = self.demonstration_count
    problems = self.problems("train", count)
    draw = random.Random(f"house expert {self.seed}")
    return [
      (problem, self.play_expert(problem, draw, self.expert_noise)[0])
      for problem in problems
    ]

  def play_expert(
    self, problem: Problem, draw: random.Random, noise: float
  ) -> tuple[tuple[Turn, ...], float]:
    """Returns how the expert plays a problem, and the reward."""
    environment = self.make_environment()
    observation = environment.reset(problem)
    expert = Expert(observation)
    turns = [Turn("user", observation)]
    while True:
      action = noisy_action(expert, environment, noise, draw)
      step = environment.step(action)
      expert.hear(action, step.observation)
      turns.append(Turn(ASSISTANT, action))
      if step.done:
        return tuple(turns), step.reward
      turns.append(Turn("user", step.observation))

  def make_environment(self) -> HouseEnvironment:
    """Returns an environment for any of the problems."""
    return HouseEnvironment(max_turns=self.max_turns)

  def grade(
    self, problems: Sequence[Problem], responses: Sequence[str]
  ) -> np.ndarray:
    """Returns f32[n]: 1 where the actions, one a line, reach the goal."""
    check_pairs(problems, responses)
    environment = self.make_environment()
    rewards = np.zeros(len(problems), np.float32)
    for i, (problem, response) in enumerate(
      zip(problems, responses, strict=True)
    ):
      environment.reset(problem)
      for action in response.splitlines():
        step = environment.step(action)
        rewards[i] = step.reward
        if step.done:
          break
    return rewards

  def grading_report(self) -> dict[str, int]:
    """Returns nothing: the rules are exact."""
    return {}

  def final_answer(self, response: str) -> str:
    """Returns the actions: two answers agree if they do the same."""
    return response.strip()

  def make_tokenizer(self) -> PreTrainedTokenizerFast:
    """Returns one token a word, with a chat template for conversations."""
    tokenizer = make_word_tokenizer(WORDS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

  def _draw_problems(self, split: str) -> Iterator[Problem]:
    """Yields distinct problems that the expert solves."""
    draw = random.Random(f"house {self.seed} {split}")
    drawn: set[str] = set()
    while True:
      goal_type = GOALS[len(drawn) % len(GOALS)]
      layout = draw_layout(goal_type, draw.choice(rooms(split)), draw)
      text = layout.dump()
      problem = Problem(f"{split}-{len(drawn)}", layout.prompt, text)
      if text not in drawn and self.play_expert(problem, draw, 0.0)[1]:
        drawn.add(text)
        yield problem


def make_house(**options: Any) -> HouseTask:
  """Makes a house task; the options are the attributes of `HouseTask`."""
  return HouseTask(**options)


@functools.cache
def rooms(split: str) -> tuple[tuple[str, ...], ...]:
  """Returns the places of every room of a split, but for the fixed ones.

  A room has two to four open and two to four closed places, which decide its
  split: no room of a split is one of another.
  """
  return tuple(
    room
    for opens, closeds in itertools.product((2, 3, 4), repeat=2)
    for chosen in itertools.product(
      itertools.combinations(OPEN_PLACES, opens),
      itertools.combinations(CLOSED_PLACES, closeds),
    )
    if text_split(" ".join(room := chosen[0] + chosen[1])) == split
  )


def draw_layout(
  goal_type: str, room: Sequence[str], draw: random.Random
) -> Layout:
  """Draws a goal of a type of `GOALS` and things for a room."""
  names = {"put": [*KIND], "two": [*KIND], "look": PAPERS}
  name = draw.choice(names.get(goal_type, FOODS + DISHES))
  state = goal_type if goal_type in ("hot", "clean", "cold") else ""
  copies = 2 if goal_type == "two" else 1
  target = "lamp" if goal_type == "look" else draw.choice(room)
  goal = Goal(name, target, state, copies)

  wanted = [name] * (copies + draw.randrange(2))
  others = draw.sample([other for other in KIND if other != name], 5)
  places: dict[str, list[str]] = {place: [] for place in (*room, *FIXED_PLACES)}
  for thing in wanted + others:
    # There is always room for what is wanted where it is wanted.
    free = [
      place
      for place, things in places.items()
      if len(things) < (ROOM_FOR - copies if place == target else ROOM_FOR)
      and not (place == target and thing == name)
    ]
    weights = [habit(KIND[thing], place) for place in free]
    places[draw.choices(free, weights)[0]].append(thing)
  order = draw.sample([*places], len(places))
  lamp = draw.choice([place for place in room if place in OPEN_PLACES])
  return Layout(goal, {place: places[place] for place in order}, lamp)
