"""Searching many questions at once, in slots that are refilled.

A search has Q slots, and a question takes one until its search is done. The
host only says who takes a free slot; everything else is four jitted programs:

  start    the empty slots, compiled once
  admit    reads prompts into free slots
  round    takes steps until enough slots are free
  widen    gives all answers in flight twice the room

Every step reads and copies the whole room of an answer, so the room begins
small and follows the longest answer in flight, not the limit. It is 64 tokens,
128, 256, ... up to `max_new_tokens`: `round` is compiled once for each of those
that is reached, and `admit` once for each of those and bucket of prompts.

A question's result depends on the key, its number and its prompt alone. It is
the same with any number of slots and in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax.decode.admit import admit, empty_beams, widen_answers
from oreo_jax.decode.batches import OnProgress, prompts_a_batch
from oreo_jax.decode.continuous import room_for
from oreo_jax.decode.generate import Generation, to_generation
from oreo_jax.decode.plan import Plan
from oreo_jax.decode.prompts import Prompts, pad_prompts
from oreo_jax.decode.step import Beams, advance, has_room
from oreo_jax.decode.winners import Winners
from oreo_jax.hosts import to_host
from oreo_jax.sharding import rows_that_divide

_ROUND_UP = 16
_FIRST_ROOM = 64  # tokens of an answer


class Search(NamedTuple):
  """What a search of Q questions returns, on the host."""

  answers: Generation  # Q rows: the winning answers
  values: np.ndarray  # f32[Q], V of each; nan without a critic
  proposed: np.ndarray  # i32[Q], tokens the policy proposed
  scores: np.ndarray  # f32[Q], the score each won by
  # Q * B * K rows, all answers of each question, and f32[Q, B * K], the score
  # of each; None unless the strategy keeps candidates.
  candidates: Generation | None = None
  candidate_scores: np.ndarray | None = None


# Called with the place of a prompt and a Search of that question alone.
OnResult = Callable[[int, Search], Any]


class Report(NamedTuple):
  """What the host wants to know of the slots after a round."""

  done: jax.Array  # bool[Q], no beam is active
  has_room: jax.Array  # bool[], all active beams have room for another step
  winners: Winners
  proposed: jax.Array  # i32[Q]
  candidates: Winners | None


start_slots = jax.jit(
  empty_beams, static_argnames=("slots", "room", "answer_room")
)
admit_questions = jax.jit(admit, donate_argnames=("state",))
# Nothing is donated: no array that is widened fits where it was.
widen = jax.jit(widen_answers, static_argnames=("room",))


@functools.partial(jax.jit, donate_argnames=("state",))
def search_round(
  plan: Plan, state: Beams, refill_at: jax.Array
) -> tuple[Beams, Report]:
  """Takes steps until slots are free, answers have no room, or all are done.

  Args:
    plan: of the search.
    state: its slots.
    refill_at: i32[], how many free slots end the round.

  Returns:
    (the slots, what the host wants to know of them).
  """

  def done(state: Beams) -> jax.Array:
    return ~jnp.any(state.active.reshape(state.problems.shape[0], -1), axis=1)

  def goes_on(state: Beams) -> jax.Array:
    free = done(state)
    count = jnp.sum(free.astype(jnp.int32))
    return (count < refill_at) & ~jnp.all(free) & has_room(state, plan)

  state = jax.lax.while_loop(
    goes_on, functools.partial(advance, plan=plan), state
  )
  report = Report(
    done(state),
    has_room(state, plan),
    state.winners,
    state.proposed,
    state.candidates,
  )
  return state, report


def search(
  plan: Plan,
  prompts: Prompts,
  *,
  slots: int | None = None,
  batch_size: int = 512,
  prompt_length: int | None = None,
  problems: Sequence[int] | np.ndarray | None = None,
  on_progress: OnProgress = lambda count: None,
  on_result: OnResult = lambda place, search: None,
) -> Search:
  """Searches every prompt; the slot of a question that is done is refilled.

  Args:
    plan: of the search, of `make_plan`.
    prompts: token ids, ragged.
    slots: questions that are searched together, a few more where the mesh has
      more batch shards; by default as many as `batch_size` has room for.
    batch_size: sequences that are decoded together, B * K a question.
    prompt_length: room for a prompt; by default that of the longest one.
    problems: the number of each question, on which its draws depend, and on
      no other question; 0, 1, ... by default.
    on_progress: called with the questions done since the last call.
    on_result: called with each question that is done, in the order in which
      they are.

  Returns:
    A Search of len(prompts) rows, in the order of the prompts.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  longest = int(lengths.max(initial=1))
  room = prompt_length or -(-longest // _ROUND_UP) * _ROUND_UP
  # Only to refuse prompts that are empty or too long.
  pad_prompts(prompts, room)
  if problems is None:
    problems = np.arange(len(lengths))
  problems = np.asarray(problems, np.int32)
  slots = prompts_a_batch(
    slots or batch_size // plan.strategy.rows, len(lengths)
  )
  # Few at once waste little when they wait for each other; one alone would
  # read its prompt alone.
  mesh = jax.sharding.get_abstract_mesh()
  places = slots if slots >= len(lengths) else -(-slots // 4)
  places = min(rows_that_divide(places, mesh), slots)

  # The longest first: they tend to take the longest, and the last ones in
  # flight are those that leave slots empty.
  queue = np.argsort(-lengths, kind="stable").tolist()
  owners = np.full(slots, -1)
  rows: list[Search | None] = [None] * len(lengths)
  answer_room = min(max(_FIRST_ROOM, plan.step_tokens), plan.max_new_tokens)
  state = start_slots(plan, slots=slots, room=room, answer_room=answer_room)
  while queue or (owners >= 0).any():
    for free in _groups(np.flatnonzero(owners < 0), places):
      entering, queue = queue[: len(free)], queue[len(free) :]
      if not entering:
        break
      state = admit_some(
        plan,
        state,
        free[: len(entering)],
        [prompts[place] for place in entering],
        problems[entering],
        places=places,
        room=room,
      )
      owners[free[: len(entering)]] = entering
    refill_at = min(places, len(queue)) if queue else slots + 1
    state, report = search_round(plan, state, np.int32(refill_at))
    fetched = to_host(report)
    if not fetched.has_room:
      answer_room = min(2 * answer_room, plan.max_new_tokens)
      state = widen(state, room=answer_room)
    ended = np.flatnonzero(fetched.done & (owners >= 0))
    for slot in ended.tolist():
      place = int(owners[slot])
      row = rows[place] = _harvest(fetched, slot, plan)
      on_result(place, row)
    owners[ended] = -1
    on_progress(len(ended))
  return jax.tree.map(lambda *xs: np.concatenate(xs), *rows)


def _groups(free: np.ndarray, size: int) -> list[np.ndarray]:
  return [free[i : i + size] for i in range(0, len(free), size)]


def admit_some(
  plan: Plan,
  state: Beams,
  slots: np.ndarray,
  prompts: Prompts,
  problems: np.ndarray,
  *,
  places: int,
  room: int,
) -> Beams:
  """Lets questions into free slots, in the shape of `places` questions.

  Args:
    plan: of the search.
    state: its slots.
    slots: i[n], which slot each takes; n is at most `places`.
    prompts: token ids of each.
    problems: i32[n], their numbers.
    places: N.
    room: of a slot for a prompt.
  """
  width = min(room_for(max(len(prompt) for prompt in prompts)), room)
  tokens, lengths = pad_prompts(prompts, width)
  fill = (0, places - len(slots))
  return admit_questions(
    plan,
    state,
    np.pad(slots.astype(np.int32), fill, constant_values=state.problems.size),
    np.pad(tokens, (fill, (0, 0))),
    np.pad(lengths, fill, constant_values=1),
    np.pad(problems, fill),
  )


def _harvest(report: Any, slot: int, plan: Plan) -> Search:
  """Returns what a question has come to, from a `Report` on the host."""

  def rows_of(answers: Any, count: int) -> tuple[Any, Generation]:
    rows: Any = jax.tree.map(
      lambda x: x[slot * count : (slot + 1) * count], answers
    )
    return rows, to_generation(
      rows.tokens, rows.lengths, rows.finished, rows.logps
    )

  winner, answer = rows_of(report.winners, 1)
  candidates = scores = None
  if report.candidates is not None:
    proposals, candidates = rows_of(report.candidates, plan.strategy.candidates)
    scores = proposals.scores[None]
  return Search(
    answer,
    winner.values,
    report.proposed[slot : slot + 1],
    winner.scores,
    candidates,
    scores,
  )
