"""The rules of the house: what is where, what an action does, what is said."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from oreo_jax.tasks.environment import Environment, Step
from oreo_jax.tasks.task import Problem

# Places that a room has some of. What is in a closed one shows when it is open.
OPEN_PLACES = ("table", "shelf", "desk", "counter", "sofa", "bed")
CLOSED_PLACES = ("drawer", "cabinet", "box", "chest", "closet", "basket")
# Places that every room has. What is put in the bin is gone.
FIXED_PLACES = ("fridge", "stove", "sink", "bin")
INSIDE = {*CLOSED_PLACES, "fridge", "bin"}  # things are in them, not on them

FOODS = ("apple", "potato", "tomato", "egg", "bread")
DISHES = ("cup", "plate", "bowl", "glass")
PAPERS = ("book", "letter", "map", "photo", "card")
KIND = (
  dict.fromkeys(FOODS, "food")
  | dict.fromkeys(DISHES, "dish")
  | dict.fromkeys(PAPERS, "paper")
)

# What one does to a thing: where, and what the thing then is.
TREATMENTS = {
  "heat": ("stove", "hot"),
  "wash": ("sink", "clean"),
  "cool": ("fridge", "cold"),
}
# What goes wrong for good: (kind, state before or None for any, verb).
MISHAPS = {
  ("food", "hot", "heat"): "burnt",
  ("dish", "hot", "heat"): "broken",
  ("dish", "hot", "cool"): "broken",
  ("dish", "cold", "heat"): "broken",
  ("paper", None, "heat"): "burnt",
  ("paper", None, "wash"): "wet",
}
RUINED = ("burnt", "broken", "wet", "torn")
# What one can do to a thing of a kind in the hand, to nobody's good.
WASTES = {"food": "eat", "dish": "drop", "paper": "tear"}
ROOM_FOR = 3  # things that a place holds

INVALID = "nothing happens"

WORDS = (
  *(*OPEN_PLACES, *CLOSED_PLACES, *FIXED_PLACES, *KIND, "lamp"),
  *("goal", "two", "hot", "clean", "cold", *RUINED),
  *("go", "to", "open", "take", "from", "put", "on", "in", *TREATMENTS),
  *WASTES.values(),
  *("use", "look", "at", "under"),
  *("you", "see", "have", "is", "closed", "full", "gone", "falls", "and"),
  *("breaks", "nothing", "happens"),
)


class Thing(NamedTuple):
  """A thing that can be carried.

  Attributes:
    name: a key of `KIND`.
    state: what was last done to it, one of `RUINED` for good; "" at first.
  """

  name: str
  state: str = ""

  @property
  def text(self) -> str:
    """What the thing is called in observations."""
    return f"{self.state} {self.name}".strip()

  @property
  def is_fragile(self) -> bool:
    """Whether it breaks when it falls."""
    return KIND[self.name] == "dish" and self.state != "broken"

  def treated(self, verb: str) -> Thing:
    """Returns the thing after a treatment, which may ruin it."""
    if self.state in RUINED:
      return self
    kind = KIND[self.name]
    for state in (self.state, None):
      if (kind, state, verb) in MISHAPS:
        return Thing(self.name, MISHAPS[kind, state, verb])
    return Thing(self.name, TREATMENTS[verb][1])


class Goal(NamedTuple):
  """What is wanted.

  Attributes:
    name: of the thing.
    place: where it is to be put, or "lamp": it is to be looked at there.
    state: what it must be, or "" for anything but ruined.
    copies: how many of them.
  """

  name: str
  place: str
  state: str = ""
  copies: int = 1

  @property
  def text(self) -> str:
    """The goal in words."""
    if self.place == "lamp":
      return f"look at {self.name} under lamp"
    what = "two " if self.copies == 2 else ""
    what += Thing(self.name, self.state).text
    return f"put {what} {preposition(self.place)} {self.place}"

  def accepts(self, thing: Thing) -> bool:
    """Says whether a thing, where it should be, is what is wanted."""
    fits = thing.state == self.state if self.state else True
    return thing.name == self.name and fits and thing.state not in RUINED


class Layout(NamedTuple):
  """A problem: the goal, the places in the order they are told, and things.

  Attributes:
    goal: what is wanted.
    places: the names of things in each place, all of them plain.
    lamp: the open place that the lamp stands on.
  """

  goal: Goal
  places: Mapping[str, Sequence[str]]
  lamp: str

  @property
  def prompt(self) -> str:
    """The first observation."""
    return f"goal {self.goal.text} you see {' '.join(self.places)}"

  def dump(self) -> str:
    """Returns the layout as a line of JSON."""
    return json.dumps([*self], separators=(",", ":"))

  @classmethod
  def load(cls, text: str) -> Layout:
    """Reads what `dump` wrote.

    Raises:
      ValueError: it is not a layout.
    """
    try:
      goal, places, lamp = json.loads(text)
      return cls(Goal(*goal), dict(places), str(lamp))
    except (TypeError, ValueError) as error:
      raise ValueError(f"not a layout of the house: {text[:80]!r}") from error


def preposition(place: str) -> str:
  """Returns how a thing is put there: "in" or "on"."""
  return "in" if place in INSIDE else "on"


class HouseEnvironment(Environment):
  """Plays a problem of the house.

  Attributes:
    layout: the problem.
    things: what is in each place now.
    held: the thing in the hand.
    here: the place one is at, "" at first.
    opened: the closed places that are open now.
    turns: actions so far.
    is_looked_at: the thing that was to be looked at was.
  """

  def __init__(self, *, max_turns: int) -> None:
    """Makes an environment whose episodes end after `max_turns` actions."""
    self.max_turns = max_turns

  def reset(self, problem: Problem) -> str:
    """Begins the problem whose answer is a dumped `Layout`."""
    self.layout = Layout.load(problem.answer)
    self.things: dict[str, list[Thing]] = {
      place: [Thing(name) for name in names]
      for place, names in self.layout.places.items()
    }
    self.held: Thing | None = None
    self.here = ""
    self.opened: set[str] = set()
    self.turns = 0
    self.is_looked_at = False
    return self.layout.prompt

  def step(self, action: str) -> Step:
    """Takes an action; the reward is 1 if the goal is reached, else 0."""
    self.turns += 1
    observation = self._act(action.split())
    won = self.is_won()
    return Step(observation, float(won), won or self.turns >= self.max_turns)

  def is_won(self) -> bool:
    """Says whether the goal is reached."""
    goal = self.layout.goal
    if goal.place == "lamp":
      return self.is_looked_at
    there = self.things[goal.place]
    return sum(map(goal.accepts, there)) >= goal.copies

  def actions(self) -> list[str]:
    """Returns all that would not be answered by "nothing happens"."""
    here, held = self.here, self.held
    possible = [f"go to {place}" for place in self.things if place != here]
    if not here:
      return possible
    if not self._is_open(here):
      possible.append(f"open {here}")
    elif held is None:
      names = dict.fromkeys(thing.name for thing in self.things[here])
      possible += [f"take {name} from {here}" for name in names]
    else:
      possible.append(f"put {held.name} {preposition(here)} {here}")
    if held is not None:
      possible.append(f"{WASTES[KIND[held.name]]} {held.name}")
      possible += [
        f"{verb} {held.name}"
        for verb, (place, _) in TREATMENTS.items()
        if place == here
      ]
    if here == self.layout.lamp:
      possible.append("use lamp")
    return possible

  def copy(self) -> HouseEnvironment:
    """Returns an independent copy in the same state."""
    other = copy.copy(self)
    other.things = {place: [*things] for place, things in self.things.items()}
    other.opened = {*self.opened}
    return other

  def _is_open(self, place: str) -> bool:
    return place == "bin" or place not in INSIDE or place in self.opened

  def _act(self, words: list[str]) -> str:
    """Does what the words say; returns the observation."""
    here, held = self.here, self.held
    match words:
      case ["go", "to", place] if place in self.things and place != here:
        self.here = place
        return self._look()
      case ["open", place] if place == here and not self._is_open(place):
        self.opened.add(place)
        # That takes two hands.
        if held is not None and held.is_fragile:
          return self._drop(held)
        return self._look()
      case ["take", name, "from", place] if place == here and held is None:
        return self._take(name)
      case ["put", name, word, place] if held is not None and place == here:
        if (name, word) == (held.name, preposition(place)):
          return self._put(held)
      case [verb, name] if verb in TREATMENTS and held is not None:
        if (name, here) == (held.name, TREATMENTS[verb][0]):
          self.held = held.treated(verb)
          return f"{name} is {self.held.state}"
      case [verb, name] if held is not None and name == held.name:
        if verb == WASTES[KIND[name]]:
          return self._waste(held)
      case ["use", "lamp"] if here == self.layout.lamp:
        if held is None:
          return "lamp is on"
        self.is_looked_at |= self.layout.goal.accepts(held)
        return f"you look at {held.text} under lamp"
    return INVALID

  def _look(self) -> str:
    here = self.here
    if not self._is_open(here):
      return f"{here} is closed"
    names = [thing.text for thing in self.things[here]]
    if here == self.layout.lamp:
      names.insert(0, "lamp")
    return f"{preposition(here)} {here} you see {' '.join(names) or 'nothing'}"

  def _take(self, name: str) -> str:
    if not self._is_open(self.here):
      return INVALID
    there = self.things[self.here]
    for thing in there:
      if thing.name == name:
        there.remove(thing)
        self.held = thing
        return f"you have {thing.text}"
    return INVALID

  def _put(self, thing: Thing) -> str:
    here = self.here
    if not self._is_open(here):
      return INVALID
    if here == "bin":
      self.held = None
      return f"{thing.name} is gone"
    there = self.things[here]
    if len(there) < ROOM_FOR:
      there.append(thing)
      self.held = None
      return f"{thing.text} is {preposition(here)} {here}"
    return self._drop(thing) if thing.is_fragile else f"{here} is full"

  def _waste(self, thing: Thing) -> str:
    match KIND[thing.name]:
      case "dish":
        return self._drop(thing)
      case "paper":
        self.held = Thing(thing.name, "torn")
        return f"{thing.name} is torn"
    self.held = None
    return f"{thing.name} is gone"

  def _drop(self, thing: Thing) -> str:
    self.held = None
    self.things[self.here].append(Thing(thing.name, "broken"))
    return f"{thing.name} falls and breaks"
