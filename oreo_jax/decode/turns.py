"""Conversations with an environment, whose caches are kept from turn to turn.

A conversation is a search with one beam whose steps are actions: K of them are
proposed, and the one of highest score is taken (`decode.step`). Between two
actions the environment says something, which is read behind the text that is
there. So no token is read twice, however many turns there are.

C conversations are in flight, in slots: a slot whose conversation has ended
begins the next one while the others go on. Five jitted programs run, each
compiled once for every room of the text, which is 128 tokens, 256, ...:

  start    the empty slots (once)
  admit    reads the beginnings of conversations into free slots
  act      lets every conversation take its next action
  observe  reads what the environment answered; once a bucket of its lengths too
  widen    gives all conversations twice the room
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models
from oreo_jax.decode.batches import prompts_a_batch
from oreo_jax.decode.branches import Reading
from oreo_jax.decode.continuous import room_for
from oreo_jax.decode.plan import Plan
from oreo_jax.decode.search import admit_some, start_slots, widen
from oreo_jax.decode.step import Beams, advance, stems_of
from oreo_jax.decode.suffixes import append
from oreo_jax.hosts import to_host
from oreo_jax.models import Cache

_FIRST_ROOM = 128  # tokens of a conversation behind its beginning


class Action(NamedTuple):
  """What a policy did in one turn."""

  tokens: np.ndarray  # i32[n], its end-of-turn included
  logps: np.ndarray  # f32[n], log pi of each token
  finished: bool  # the last token ends the turn; False: it was cut
  value: float  # V of it, nan without a critic
  turn: int  # which turn of the conversation, from 0 on


class Report(NamedTuple):
  """What the host wants to know of C conversations after a turn."""

  tokens: jax.Array  # i32[C, M]; rubbish beyond `counts`
  logps: jax.Array  # f32[C, M]
  counts: jax.Array  # i32[C], tokens of the action
  finished: jax.Array  # bool[C], the last of them ends the turn
  values: jax.Array  # f32[C]


@functools.partial(jax.jit, donate_argnames=("state",))
def act(plan: Plan, state: Beams) -> tuple[Beams, Report]:
  """Lets every active conversation take its next action.

  None is active afterwards, until it is answered (`observe`).

  Args:
    plan: with one beam.
    state: C conversations, all with room for an action.

  Returns:
    (the conversations, what they did).
  """
  before = state.lengths
  after = advance(state, plan)
  room = after.tokens.shape[1]
  place = before[:, None] + jnp.arange(plan.step_tokens)[None]
  place = jnp.minimum(place, room - 1)
  tokens, logps = (
    jnp.take_along_axis(x, place, axis=1) for x in (after.tokens, after.logps)
  )
  counts = after.lengths - before
  last = jnp.take_along_axis(
    tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1
  )
  eos = jnp.asarray(plan.eos_ids, jnp.int32)[None]
  finished = jnp.any(last == eos, axis=1) & (counts > 0)
  after = after._replace(active=jnp.zeros_like(after.active))
  return after, Report(tokens, logps, counts, finished, after.reading.values)


@functools.partial(jax.jit, donate_argnames=("state",))
def observe(
  plan: Plan,
  state: Beams,
  tokens: jax.Array,
  counts: jax.Array,
) -> Beams:
  """Reads what environments said, behind the text of their conversations.

  Args:
    plan: as for `act`.
    state: C conversations, all with room for W + 1 tokens.
    tokens: i32[C, W], left-aligned.
    counts: i32[C], tokens of each; 0 for a conversation that has ended. It is
      not active from then on, and what its row holds means nothing.

  Returns:
    The conversations; those that were answered are active.
  """
  stems = stems_of(state)
  count, width = tokens.shape
  # The policy has not read the last token of the action. Neither will it have
  # read the last one here before the next turn, but the layers that a critic
  # shares have to say something of it.
  fed = jnp.concatenate([state.fed[:, None], tokens], axis=1)
  read = models.apply_branches(
    plan.policy,
    fed,
    plan.config,
    shared=stems.shared,
    local=models.init_cache(plan.config, count, width + 1),
    slot=0,
    stream_at=plan.shared_layers or None,
  )
  at_last = jnp.maximum(counts - 1, 0)[:, None]
  last = jnp.take_along_axis(tokens, at_last, axis=1)[:, 0]
  reading, critic_cache = state.reading, state.critic_cache
  if critic_cache is not None:
    stream = read.stream
    judged = models.apply_branches(
      cast(models.Params, plan.critic),
      tokens,
      plan.critic_config,
      shared=stems.critic_shared,
      local=models.init_cache(plan.critic_config, count, width),
      slot=0,
      start=None if stream is None else stream[:, 1:],
    )
    hidden = jnp.take_along_axis(judged.hidden, at_last[..., None], axis=1)
    value = models.values(cast(models.Params, plan.critic), hidden[:, 0])
    # The state before an action is one at which V was trained.
    reading = Reading(
      values=value,
      last_values=value,
      least=jnp.minimum(reading.least, value),
      total=reading.total + value,
      states=reading.states + 1,
      at_last=jnp.ones(count, bool),
    )
    critic_cache = _append(critic_cache, judged.cache, state.lengths)
  no_logps = jnp.zeros(tokens.shape, jnp.float32)
  return state._replace(
    tokens=append(state.tokens, tokens, state.lengths),
    logps=append(state.logps, no_logps, state.lengths),
    cache=_append(state.cache, read.cache, state.lengths),
    critic_cache=critic_cache,
    lengths=state.lengths + counts,
    fed=last,
    reading=reading,
    active=counts > 0,
  )


def _append(old: Cache, new: Cache | None, start: jax.Array) -> Cache:
  """Returns a cache with new slots behind those of every row."""
  return jax.tree.map(lambda x, y: append(x, y, start, axis=3), old, new)


class Conversations:
  """C slots of conversations, on the host's side.

  The numbers of conversations, their turns and the key of the plan are all
  that draws depend on.

  Attributes:
    plan: of its actions.
    slots: C.
    prompt_room: most tokens of the beginning of a conversation.
  """

  def __init__(self, plan: Plan, slots: int, prompt_room: int):
    """Makes the slots, in which nothing is said yet.

    Args:
      plan: of `make_plan`, with one beam. Its `max_new_tokens` is the most
        that a conversation may have behind its beginning, and its
        `max_step_tokens` the most of an action.
      slots: C; a few more where the mesh has more batch shards.
      prompt_room: most tokens of a beginning.

    Raises:
      ValueError: for a plan with several beams.
    """
    if plan.strategy.beams != 1:
      raise ValueError(
        f"strategy.beams: expected 1, one way a conversation goes, got "
        f"{plan.strategy.beams}; take `best_of_actions(K)`"
      )
    self.plan = plan
    self.slots = prompts_a_batch(slots, slots)
    self.prompt_room = room_for(prompt_room)
    self._room = min(max(_FIRST_ROOM, plan.step_tokens), plan.max_new_tokens)
    self._state = start_slots(
      plan, slots=self.slots, room=self.prompt_room, answer_room=self._room
    )
    self._lengths = np.zeros(self.slots, np.int64)
    self._turns = np.zeros(self.slots, np.int64)
    self._active = np.zeros(self.slots, bool)

  def begin(
    self,
    slots: Sequence[int],
    prompts: Sequence[np.ndarray],
    numbers: Sequence[int],
  ) -> None:
    """Begins conversations in free slots.

    Args:
      slots: which slot each takes.
      prompts: i32[L] each, its beginning, the first observation included.
      numbers: of the conversations, on which their draws depend.
    """
    for start in range(0, len(slots), self._places):
      some = slice(start, start + self._places)
      self._state = admit_some(
        self.plan,
        self._state,
        np.asarray(slots[some]),
        prompts[some],
        np.asarray(numbers[some], np.int32),
        places=self._places,
        room=self.prompt_room,
      )
    index = np.asarray(slots, np.int64)
    self._lengths[index] = self._turns[index] = 0
    self._active[index] = True

  def act(self) -> dict[int, Action]:
    """Takes the next action of every active conversation, by its slot."""
    self._make_room(self.plan.step_tokens)
    self._state, report = act(self.plan, self._state)
    told: Any = to_host(report)
    actions = {}
    for slot in np.flatnonzero(self._active).tolist():
      count = int(told.counts[slot])
      actions[slot] = Action(
        told.tokens[slot, :count],
        told.logps[slot, :count],
        bool(told.finished[slot]),
        float(told.values[slot]),
        int(self._turns[slot]),
      )
      self._lengths[slot] += count
      self._turns[slot] += 1
    self._active[:] = False
    return actions

  def has_room(self, slot: int, count: int) -> bool:
    """Returns whether a conversation has room for so many tokens and more."""
    return bool(self._lengths[slot] + count + 1 < self.plan.max_new_tokens)

  def observe(self, observations: Mapping[int, np.ndarray]) -> None:
    """Reads what was answered to the last actions; others have ended.

    Args:
      observations: i32[n] by slot, each with room (`has_room`) and at least
        one token.
    """
    if not observations:
      return
    longest = room_for(max(map(len, observations.values())))
    width = min(longest, self.plan.max_new_tokens - 1)
    tokens = np.zeros((self.slots, width), np.int32)
    counts = np.zeros(self.slots, np.int32)
    for slot, observation in observations.items():
      tokens[slot, : len(observation)] = observation
      counts[slot] = len(observation)
    self._make_room(width + 1)
    self._state = observe(self.plan, self._state, tokens, counts)
    self._lengths += counts
    self._active[:] = counts > 0

  @property
  def _places(self) -> int:
    """Returns how many beginnings are read together."""
    return prompts_a_batch(-(-self.slots // 4), self.slots)

  def _make_room(self, count: int) -> None:
    longest = self._lengths.max()
    while (
      longest + count > self._room and self._room < self.plan.max_new_tokens
    ):
      self._room = min(2 * self._room, self.plan.max_new_tokens)
      self._state = widen(self._state, room=self._room)
