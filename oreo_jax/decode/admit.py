"""Questions enter a search: the slots they take, and reading their prompts."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.branches import first_reading
from oreo_jax.decode.grow import Text
from oreo_jax.decode.plan import Plan
from oreo_jax.decode.prompts import read_prompts
from oreo_jax.decode.step import Beams
from oreo_jax.decode.winners import Winners
from oreo_jax.models import Cache, Shared
from oreo_jax.sharding import constrain_batch

Tree = TypeVar("Tree")


def empty_beams(
  plan: Plan, slots: int, room: int, answer_room: int | None = None
) -> Beams:
  """Returns the state of a search in which no question is in flight.

  Args:
    plan: of the search.
    slots: Q, questions that are searched together.
    room: tokens of the longest prompt.
    answer_room: A, tokens that the beams have room for at first; see
      `widen_answers`. By default that of the longest answer.
  """
  strategy, longest = plan.strategy, plan.max_new_tokens
  most = answer_room or longest
  beams = slots * strategy.beams

  def prompts_of(config: ModelConfig) -> Shared:
    cache = models.init_cache(config, slots, room)
    return Shared(cache, jnp.ones(slots, jnp.int32))

  critic_prompts = critic_cache = None
  if plan.critic is not None:
    critic_prompts = prompts_of(plan.critic_config)
    critic_cache = models.init_cache(plan.critic_config, beams, most)
  return _pin(
    Beams(
      steps=jnp.zeros(slots, jnp.int32),
      problems=jnp.zeros(slots, jnp.int32),
      prompts=Text(
        jnp.zeros((slots, room), jnp.int32), jnp.ones(slots, jnp.int32)
      ),
      prompt_cache=prompts_of(plan.config),
      tokens=jnp.zeros((beams, most), jnp.int32),
      lengths=jnp.zeros(beams, jnp.int32),
      logps=jnp.zeros((beams, most), jnp.float32),
      fed=jnp.zeros(beams, jnp.int32),
      stop_state=jnp.zeros(beams, jnp.int32),
      cache=models.init_cache(plan.config, beams, most),
      critic_prompts=critic_prompts,
      critic_cache=critic_cache,
      reading=first_reading(jnp.full(beams, jnp.nan, jnp.float32)),
      hashes=jnp.zeros((beams, 2), jnp.uint32),
      active=jnp.zeros(beams, bool),
      winners=_no_answers(slots, longest),
      proposed=jnp.zeros(slots, jnp.int32),
      candidates=_no_answers(slots * strategy.candidates, longest)
      if strategy.keep_candidates
      else None,
    )
  )


def admit(
  plan: Plan,
  state: Beams,
  slots: jax.Array,
  prompts: jax.Array,
  lengths: jax.Array,
  problems: jax.Array,
) -> Beams:
  """Reads prompts, and lets their questions begin in free slots.

  Every beam of a new question has an empty answer. What the slots held before
  is not cleared: lengths say what means something.

  Args:
    plan: of the search.
    state: with slots whose questions are done.
    slots: i32[N], which slot each question takes; Q, which is none, for the
      rows that only fill the shape.
    prompts: i32[N, W], W at most the room of a slot.
    lengths: i32[N], tokens of each prompt.
    problems: i32[N], the number of each question.
  """
  beams = plan.strategy.beams
  new, width = slots.shape[0], prompts.shape[1]
  last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
  values = jnp.full(new, jnp.nan, jnp.float32)

  def put_prompts(old: Shared, read: Shared) -> Shared:
    return Shared(
      jax.tree.map(
        lambda x, y: x.at[:, slots, :, :width].set(
          y.astype(x.dtype), mode="drop"
        ),
        old.cache,
        read.cache,
      ),
      old.lengths.at[slots].set(read.lengths, mode="drop"),
    )

  # A critic that goes on from the policy's layers reads the last token too.
  depth = plan.shared_layers
  out, read = read_prompts(
    plan.policy,
    prompts,
    lengths if depth else lengths - 1,
    plan.config,
    stream_at=depth or None,
  )
  prompt_cache = put_prompts(
    state.prompt_cache, read._replace(lengths=lengths - 1)
  )
  critic_prompts = state.critic_prompts
  if plan.critic is not None and critic_prompts is not None:
    out, read = read_prompts(
      plan.critic, prompts, lengths, plan.critic_config, start=out.stream
    )
    hidden = out.hidden[jnp.arange(new), lengths - 1]
    values = models.values(plan.critic, hidden)
    critic_prompts = put_prompts(critic_prompts, read)

  count = new * beams
  zeros = jnp.zeros(count, jnp.int32)
  # Rows of the beams; Q * B is none.
  rows = (slots[:, None] * beams + jnp.arange(beams)[None]).reshape(-1)

  def put(old: Tree, new: Tree, places: jax.Array) -> Tree:
    return jax.tree.map(lambda x, y: x.at[places].set(y, mode="drop"), old, new)

  return _pin(
    state._replace(
      steps=state.steps.at[slots].set(0, mode="drop"),
      problems=put(state.problems, problems, slots),
      prompts=Text(
        state.prompts.tokens.at[slots, :width].set(prompts, mode="drop"),
        put(state.prompts.lengths, lengths, slots),
      ),
      prompt_cache=prompt_cache,
      lengths=put(state.lengths, zeros, rows),
      fed=put(state.fed, jnp.repeat(last, beams), rows),
      stop_state=put(state.stop_state, zeros, rows),
      critic_prompts=critic_prompts,
      reading=put(
        state.reading, first_reading(jnp.repeat(values, beams)), rows
      ),
      hashes=put(state.hashes, jnp.zeros((count, 2), jnp.uint32), rows),
      active=put(state.active, jnp.ones(count, bool), rows),
      winners=put(
        state.winners,
        _no_answers(new, plan.max_new_tokens)._replace(values=values),
        slots,
      ),
      proposed=state.proposed.at[slots].set(0, mode="drop"),
    )
  )


def _no_answers(count: int, room: int) -> Winners:
  return Winners(
    tokens=jnp.zeros((count, room), jnp.int32),
    lengths=jnp.zeros(count, jnp.int32),
    logps=jnp.zeros((count, room), jnp.float32),
    finished=jnp.zeros(count, bool),
    values=jnp.full(count, jnp.nan, jnp.float32),
    scores=jnp.full(count, -jnp.inf, jnp.float32),
  )


def widen_answers(state: Beams, room: int) -> Beams:
  """Returns the state with room for longer answers.

  Args:
    state: of a search.
    room: A, tokens that the beams have room for; more than they had.
  """
  more = room - state.tokens.shape[1]

  def pad(x: jax.Array, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, more)
    return jnp.pad(x, widths)

  def pad_cache(cache: Cache) -> Cache:
    return jax.tree.map(lambda x: pad(x, 3), cache)

  critic_cache = state.critic_cache
  return _pin(
    state._replace(
      tokens=pad(state.tokens, 1),
      logps=pad(state.logps, 1),
      cache=pad_cache(state.cache),
      critic_cache=None if critic_cache is None else pad_cache(critic_cache),
    )
  )


def rows_dims(state: Beams) -> Beams:
  """Returns a tree of the same structure: which dimension the rows are of."""
  caches = {"prompt_cache", "cache", "critic_prompts", "critic_cache"}
  return Beams(
    *(
      jax.tree.map(lambda x, first=name in caches: int(first and x.ndim > 1), x)
      for name, x in zip(Beams._fields, state, strict=True)
    )
  )


def _pin(state: Beams) -> Beams:
  """Splits the rows of a state over the batch axes of the mesh in force.

  A state that always lies in one way is compiled for once.
  """
  return jax.tree.map(constrain_batch, state, rows_dims(state))
