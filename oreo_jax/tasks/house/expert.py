"""An expert that plays the house by what it is told, and nothing else.

It remembers what it saw where, looks for things first where they usually are,
and ruins none. With noise it forgets, and does things without a reason.
"""

from __future__ import annotations

import random

from oreo_jax.tasks.house.world import (
  CLOSED_PLACES,
  INSIDE,
  INVALID,
  KIND,
  ROOM_FOR,
  RUINED,
  TREATMENTS,
  Goal,
  HouseEnvironment,
  Thing,
  preposition,
)

# How much likelier than elsewhere (1) a kind of thing is in a place.
HABITS = {
  "food": {"fridge": 6, "counter": 4, "table": 3, "basket": 3, "stove": 2},
  "dish": {"cabinet": 5, "sink": 4, "shelf": 3, "counter": 3, "table": 2},
  "paper": {"desk": 5, "drawer": 4, "shelf": 3, "bed": 3, "box": 2},
}
HABITS["paper"] |= {"fridge": 0, "stove": 0, "sink": 0}


def habit(kind: str, place: str) -> int:
  """Returns how likely a kind of thing is in a place, 1 in most of them."""
  return 0 if place == "bin" else HABITS[kind].get(place, 1)


def read_goal(words: list[str]) -> Goal:
  """Reads a goal in words (see `Goal.text`)."""
  if words[0] == "look":
    return Goal(words[2], "lamp")
  *what, _, place = words[1:]
  copies = 2 if what[0] == "two" else 1
  state = "" if copies == 2 or len(what) == 1 else what[0]
  return Goal(what[-1], place, state, copies)


class Expert:
  """Plays one episode; `act` and `hear` take turns.

  Attributes:
    goal: what is wanted.
    seen: what it remembers of the places it looked into.
  """

  def __init__(self, observation: str) -> None:
    """Reads the first observation."""
    words = observation.split()
    middle = words.index("you")
    self.goal = read_goal(words[1:middle])
    self.seen: dict[str, list[Thing]] = {}
    self._places = [place for place in words[middle + 2 :] if place != "bin"]
    self._here = ""
    self._held: Thing | None = None
    self._lamp = ""
    self._opened: set[str] = set()
    self._is_closed = False  # the place where it is

  def forget(self) -> None:
    """Forgets where things are, but not what it is about."""
    self.seen.clear()
    self._lamp = ""

  def act(self, *, is_hasty: bool = False) -> str:
    """Returns the next action.

    Args:
      is_hasty: do without what only pays later: treating a thing, or opening a
        place before there is a dish in the hand.
    """
    held, goal = self._held, self.goal
    if held is None:
      if self._should_open(is_hasty):
        return self._approach(goal.place, "")
      return self._fetch()
    if not self._is_usable(held):
      return self._put_down(held)
    if goal.state and held.state != goal.state and not is_hasty:
      verb = self._treatment(held)
      place = TREATMENTS[verb][0]
      return f"{verb} {held.name}" if self._here == place else f"go to {place}"
    if goal.place == "lamp":
      return (
        self._approach(self._lamp, "use lamp") if self._lamp else self._look()
      )
    if self._should_open(is_hasty):
      return self._put_down(held)
    return self._approach(
      goal.place, f"put {held.name} {preposition(goal.place)} {goal.place}"
    )

  def hear(self, action: str, observation: str) -> None:
    """Takes in what an action led to, whoever chose the action."""
    if observation == INVALID:
      return
    match action.split():
      case ["go", "to", place] | ["open", place]:
        self._here, self._is_closed = place, observation.endswith("closed")
        if observation.endswith("breaks"):
          self._held = None
          self._opened.add(place)
        elif not self._is_closed:
          self._opened.add(place)
          self.seen[place] = _read_things(observation.split()[4:])
          if "lamp" in observation:
            self._lamp = place
      case ["take", _, _, place]:
        self._held = thing = _read_things(observation.split()[2:])[0]
        if thing in self.seen.get(place, ()):
          self.seen[place].remove(thing)
      case ["put", _, _, place] if self._held and "full" not in observation:
        left = observation.split()
        state = "broken" if left[-1] == "breaks" else self._held.state
        if left[-1] != "gone" and place in self.seen:
          self.seen[place].append(Thing(self._held.name, state))
        self._held = None
      case [_, name] if self._held and name == self._held.name:
        self._held = None
        if (state := observation.split()[-1]) not in ("gone", "breaks"):
          self._held = Thing(name, state)
        elif state == "breaks" and self._here in self.seen:
          self.seen[self._here].append(Thing(name, "broken"))

  def _should_open(self, is_hasty: bool) -> bool:
    """Says whether to open the goal's place while both hands are free."""
    return (
      self.goal.place in CLOSED_PLACES
      and self.goal.place not in self._opened
      and KIND[self.goal.name] == "dish"
      and not is_hasty
    )

  def _is_usable(self, thing: Thing) -> bool:
    return thing.name == self.goal.name and thing.state not in RUINED

  def _treatment(self, thing: Thing) -> str:
    """Returns what to do next to make the thing what is wanted."""
    # A dish that goes from hot to cold, or back, breaks: water is between.
    if KIND[thing.name] == "dish" and thing.state in ("hot", "cold"):
      return "wash"
    return next(
      verb
      for verb, (_, state) in TREATMENTS.items()
      if state == self.goal.state
    )

  def _fetch(self) -> str:
    """Takes what is wanted if it knows where, else goes on looking."""
    name = self.goal.name
    known = [
      place
      for place, things in self.seen.items()
      if any(
        self._is_usable(thing)
        and not (place == self.goal.place and self.goal.accepts(thing))
        # `take` takes the first of a name.
        and thing == next(other for other in things if other.name == name)
        for thing in things
      )
    ]
    if not known:
      return self._look()
    place = self._here if self._here in known else known[0]
    return self._approach(place, f"take {name} from {place}")

  def _approach(self, place: str, action: str) -> str:
    """Goes to a place, opens it if need be, and then takes the action."""
    if self._here != place:
      return f"go to {place}"
    return f"open {place}" if self._is_closed else action

  def _look(self) -> str:
    """Looks into the likeliest place it does not remember."""
    if self._is_closed and self._here not in self.seen:
      return f"open {self._here}"
    if self._held is not None:  # It has the thing and wants the lamp.
      unseen = [p for p in self._places if p not in (*INSIDE, *self.seen)]
    else:
      unseen = [p for p in self._places if p not in self.seen]
    unseen = [place for place in unseen if place != self._here]
    if not unseen:
      # It cannot be where it was not seen: start anew.
      self.forget()
      unseen = [place for place in self._places if place != self._here]
    kind = KIND[self.goal.name]
    # A closed place costs two turns.
    return "go to " + max(
      unseen, key=lambda p: habit(kind, p) / (2 if p in INSIDE else 1)
    )

  def _put_down(self, thing: Thing) -> str:
    """Gets rid of a thing that is not wanted, on the way."""
    here = self._here
    would_drop = self._is_closed and thing.is_fragile
    if here in ("", "bin", self.goal.place) or would_drop:
      # Never empty: at least three such places are left, and a room has at most
      # eight things, too few to fill all of them.
      free = [
        p
        for p in self._places
        if p not in CLOSED_PLACES
        and p not in (here, self.goal.place, "fridge")
        and len(self.seen.get(p, ())) < ROOM_FOR
      ]
      return f"go to {free[0]}"
    if len(self.seen.get(here, ())) >= ROOM_FOR and not self._is_closed:
      return self._look()
    return self._approach(here, f"put {thing.name} {preposition(here)} {here}")


def _read_things(words: list[str]) -> list[Thing]:
  """Reads things in a row, such as "lamp hot apple cup" or "nothing"."""
  things, state = [], ""
  for word in words:
    if word in KIND:
      things.append(Thing(word, state))
      state = ""
    elif word not in ("lamp", "nothing"):
      state = word
  return things


def noisy_action(
  expert: Expert,
  environment: HouseEnvironment,
  noise: float,
  draw: random.Random,
) -> str:
  """Returns the expert's next action, or one that is not as good.

  With probability `noise` it slips. Every other slip is anything that is
  possible: first the verb is drawn, then what it is about. At the others it is
  hasty, or forgets what it has seen and then acts.
  """
  if draw.random() >= noise:
    return expert.act()
  slip = draw.randrange(4)
  if slip == 0:
    expert.forget()
  if slip < 2:
    return expert.act(is_hasty=slip == 1)
  by_verb: dict[str, list[str]] = {}
  for action in environment.actions():
    by_verb.setdefault(action.split()[0], []).append(action)
  return draw.choice(by_verb[draw.choice([*by_verb])])
