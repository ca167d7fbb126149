"""Steps that grow from texts: proposed by the policy, judged by the critic.

The texts are the beams of a search, or the nodes of a tree of lookahead. With R
texts and K branches each, branch c continues text c // K. Whatever branches
share is read where it lies, in levels (see `models.cache`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from oreo_jax import models
from oreo_jax.decode.grow import Rows, Text, grow, grow_first, start_rows
from oreo_jax.decode.plan import Plan
from oreo_jax.decode.sampling import Sampling
from oreo_jax.decode.scores import Candidates
from oreo_jax.decode.stops import Stops
from oreo_jax.decode.stops import advance as read_stops
from oreo_jax.models import Cache, Shared


class Reading(NamedTuple):
  """What the critic has said along R texts, where it was trained."""

  values: jax.Array  # f32[R], V at the last such state
  last_values: jax.Array  # f32[R], V at the last token, trained there or not
  least: jax.Array  # f32[R], the least V of all such states
  total: jax.Array  # f32[R], the sum of V over them
  states: jax.Array  # i32[R], how many they are
  at_last: jax.Array  # bool[R], the last token is one of them


class Stems(NamedTuple):
  """R texts that branches grow from."""

  shared: tuple[Shared, ...]  # of the policy: all but the last token
  critic_shared: tuple[Shared, ...]  # of the critic: all tokens
  texts: tuple[Text, ...]
  fed: jax.Array  # i32[R], the last token
  stop_state: jax.Array  # i32[R], where the automaton of the stops is
  lengths: jax.Array  # i32[R], tokens of the answer so far
  logps: jax.Array  # f32[R], log pi of it
  reading: Reading
  active: jax.Array  # bool[R]; others have no branches


def first_reading(values: jax.Array) -> Reading:
  """Returns the reading of prompts, from f32[R], V of them."""
  return Reading(
    values=values,
    last_values=values,
    least=values,
    total=values,
    states=jnp.ones(values.shape, jnp.int32),
    at_last=jnp.ones(values.shape, bool),
  )


def propose(plan: Plan, stems: Stems, keys: jax.Array) -> Rows:
  """Grows branches to the end of their step, of the answer, or of the room.

  Args:
    plan: of the search.
    stems: R texts.
    keys: key[R * K], of the branches.

  Returns:
    R * K rows, those of a text side by side.
  """
  count, texts = keys.shape[0], stems.fed.shape[0]
  branches = count // texts
  stops = None if plan.strategy.whole_answers else plan.stops
  limits = jnp.where(stems.active, plan.max_new_tokens - stems.lengths, 0)
  rows = start_rows(
    plan.config,
    keys=keys,
    sampling=Sampling(*(jnp.broadcast_to(x, count) for x in plan.sampling)),
    limits=jnp.repeat(limits, branches),
    fed=jnp.repeat(stems.fed, branches),
    stop_state=jnp.repeat(stems.stop_state, branches),
    slots=plan.step_tokens,
    keeps_stream=plan.shared_layers > 0,
  )
  read = plan.policy, stems.shared, stems.texts
  ends: Any = {"eos_ids": plan.eos_ids, "stops": stops}
  rows = grow_first(*read, rows, plan.config, **ends)
  return grow(*read, rows, plan.config, stream_at=plan.shared_layers, **ends)


def judge(
  plan: Plan, stems: Stems, grown: Rows
) -> tuple[Reading, Cache | None]:
  """Reads V along each branch, all its new tokens in one go.

  V is read where it was trained. That is never at the end-of-sequence token
  itself: a finished answer is read at the state before it, which may be the one
  that the step started from. At token level all other states count; at step
  level those at which a step ended, so that a step that was cut keeps the value
  of the state where it began, and so does an action of turn level.

  Args:
    plan: of the search.
    stems: R texts.
    grown: R * K branches of them.

  Returns:
    (the reading of the branches, the critic's cache of their new tokens).
  """
  count, texts = grown.lengths.shape[0], stems.fed.shape[0]
  before = jax.tree.map(
    lambda x: jnp.repeat(x, count // texts, axis=0), stems.reading
  )
  if plan.critic is None:
    return before, None
  room = grown.tokens.shape[1]
  start = None
  if plan.shared_layers:
    start = _streams(plan, stems, grown)
  read = models.apply_branches(
    plan.critic,
    grown.tokens,
    plan.critic_config,
    shared=stems.critic_shared,
    local=models.init_cache(plan.critic_config, count, room),
    slot=0,
    start=start,
  )
  # Column i is V after i new tokens, in this and in the masks below.
  along = jnp.concatenate(
    [before.last_values[:, None], models.values(plan.critic, read.hidden)],
    axis=1,
  )
  column = jnp.arange(room + 1, dtype=jnp.int32)[None]
  end = (grown.lengths - grown.finished.astype(jnp.int32))[:, None]
  readable = (column > 0) & (column <= end)
  if plan.granularity != "token":
    if plan.granularity == "step":
      readable &= jnp.pad(_step_ends(plan, stems, grown), ((0, 0), (1, 0)))
    else:
      readable = jnp.zeros_like(readable)
    # The state before an end-of-sequence counts as well, once.
    fresh = (column > 0) | ~before.at_last[:, None]
    readable |= grown.finished[:, None] & (column == end) & fresh
  last = jnp.max(jnp.where(readable, column, -1), axis=1)

  def at(columns: jax.Array) -> jax.Array:
    columns = jnp.maximum(columns, 0)[:, None]
    return jnp.take_along_axis(along, columns, axis=1)[:, 0]

  least = jnp.min(jnp.where(readable, along, jnp.inf), axis=1)
  reading = Reading(
    values=jnp.where(last >= 0, at(last), before.values),
    last_values=at(grown.lengths),
    least=jnp.minimum(before.least, least),
    total=before.total + jnp.sum(jnp.where(readable, along, 0.0), axis=1),
    states=before.states + jnp.sum(readable.astype(jnp.int32), axis=1),
    at_last=(last == grown.lengths) | (grown.lengths == 0) & before.at_last,
  )
  # It gives a cache back because it got one.
  return reading, read.cache


def _streams(plan: Plan, stems: Stems, grown: Rows) -> jax.Array:
  """Returns what the layers that both networks have say of the new tokens.

  The policy has said it of all of them while it drew the next one, but for the
  last token of a branch, which was fed to nobody. These layers read that token
  now. What they keep of it is dropped: where the branch is chosen its last
  token is fed in the next step, once for all that grows from it.

  Args:
    plan: of the search, with shared layers.
    stems: R texts.
    grown: R * K branches of them.

  Returns:
    [R * K, M, D], in the order of the tokens; rubbish behind the last one.
  """
  rows, room = grown.tokens.shape
  last = models.apply_branches(
    plan.policy,
    grown.fed[:, None],
    plan.config,
    # The branches are a level, as in `lookahead`: one that ended early was fed
    # its last token over and over, behind what its length says.
    shared=(*stems.shared, Shared(grown.cache, grown.lengths)),
    local=models.init_cache(plan.config, rows, 1),
    slot=0,
    stream_at=plan.shared_layers,
  ).stream
  # Both are there, because they were asked for.
  along, last = cast(jax.Array, grown.stream), cast(jax.Array, last)
  # Slot 0 is of the last token of the stem, which the critic has read.
  along = jnp.roll(along, -1, axis=1)
  column = jnp.arange(room, dtype=jnp.int32)[None]
  is_last = column == grown.lengths[:, None] - 1
  return jnp.where(is_last[..., None], last, along)


def _step_ends(plan: Plan, stems: Stems, grown: Rows) -> jax.Array:
  """Returns bool[C, M]: which new tokens end a step."""
  if not plan.strategy.whole_answers:
    # A branch stops at the first of them.
    last = jnp.arange(grown.tokens.shape[1])[None] == grown.lengths[:, None] - 1
    return last & grown.step_ended[:, None]
  # `make_plan` has seen to it that they are there.
  stops = cast(Stops, plan.stops)

  def read(state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    return read_stops(stops, state, token)

  branches = grown.lengths.shape[0] // stems.fed.shape[0]
  state = jnp.repeat(stems.stop_state, branches)
  return jax.lax.scan(read, state, grown.tokens.T)[1].T


def candidates_of(
  stems: Stems, grown: Rows, reading: Reading
) -> tuple[Candidates, jax.Array]:
  """Returns what branches are ranked by, and log pi of their new tokens."""
  branches = grown.lengths.shape[0] // stems.fed.shape[0]
  inside = jnp.arange(grown.logps.shape[1])[None] < grown.lengths[:, None]
  new_logps = jnp.sum(jnp.where(inside, grown.logps, 0.0), axis=1)
  return Candidates(
    values=reading.values,
    min_values=reading.least,
    mean_values=reading.total / reading.states.astype(jnp.float32),
    logps=jnp.repeat(stems.logps, branches) + new_logps,
    lengths=jnp.repeat(stems.lengths, branches) + grown.lengths,
    finished=grown.finished,
  ), new_logps
