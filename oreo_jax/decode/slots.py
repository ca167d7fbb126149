"""The device side of the engine: fixed slots that are refilled.

G groups hold a prompt each, and every group has some rows that answer it. Four
things happen to the state, each in a jitted function of fixed shapes, so that
refilling compiles nothing:

  read_into   new prompts are read into groups; one shape a prompt length
  turn        rows begin, and all active ones grow until enough have ended
  take_rows   what ended rows hold is taken out
  empty_slots makes the state
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.grow import Rows, Text, grow, start_rows
from oreo_jax.decode.prompts import read_prompts
from oreo_jax.decode.sampling import Sampling, row_keys
from oreo_jax.decode.stops import Stops
from oreo_jax.models import Cache, Params, Shared
from oreo_jax.sharding import constrain_batch


class Slots(NamedTuple):
  """G prompts, and R rows of which R / G side by side answer one of them."""

  prompts: Text  # i32[G, S]
  shared: Shared  # the policy's, of all but the last token of a prompt
  rows: Rows


def _pinned(state: Slots) -> Slots:
  """Pins groups and rows to the devices, in every program to the same ones.

  Where one program left an array elsewhere than the last one had, the next
  would be compiled again.
  """
  rows = state.rows
  pinned = jax.tree.map(
    lambda x: constrain_batch(x) if x.ndim else x,
    # A cache has its rows in another dimension.
    rows._replace(cache=Cache(rows.fed, rows.fed)),
  )
  return Slots(
    jax.tree.map(constrain_batch, state.prompts),
    Shared(
      models.constrain_cache(state.shared.cache),
      constrain_batch(state.shared.lengths),
    ),
    pinned._replace(cache=models.constrain_cache(rows.cache)),
  )


class Begin(NamedTuple):
  """The answers of R rows, and which of them begin now."""

  begins: np.ndarray  # bool[R]; the others go on, and the rest is not read
  problems: np.ndarray  # i32[R]
  samples: np.ndarray  # i32[R]
  sampling: Sampling
  limits: np.ndarray  # i32[R], most tokens
  fed: np.ndarray  # i32[R], the prompt's last token


class Report(NamedTuple):
  """What the host wants to know of the rows after a turn."""

  active: jax.Array  # bool[R]
  steps: jax.Array  # i32[], since the slots were made


class Ended(NamedTuple):
  """What some rows hold."""

  tokens: jax.Array  # i32[N, M]; rubbish beyond `lengths`
  lengths: jax.Array  # i32[N]
  finished: jax.Array  # bool[N], the last one is an end-of-sequence
  stopped: jax.Array  # bool[N], the last one completes a stop string
  logps: jax.Array  # f32[N, M]


@functools.partial(
  jax.jit,
  static_argnames=("config", "groups", "rows_per_group", "room", "slots"),
)
def empty_slots(
  key: jax.Array,
  *,
  config: ModelConfig,
  groups: int,
  rows_per_group: int,
  room: int,
  slots: int,
) -> Slots:
  """Makes slots in which nothing is active.

  Args:
    key: any; its kind is that of the draws.
    config: the policy's architecture.
    groups: G.
    rows_per_group: R / G.
    room: S, most tokens of a prompt.
    slots: M, most tokens of an answer.
  """
  count = groups * rows_per_group
  none = jnp.zeros(count, jnp.int32)
  zero = jnp.zeros(count, jnp.float32)
  lengths = jnp.zeros(groups, jnp.int32)
  state = Slots(
    prompts=Text(jnp.zeros((groups, room), jnp.int32), lengths),
    shared=Shared(models.init_cache(config, groups, room), lengths),
    rows=start_rows(
      config,
      keys=row_keys(key, none, none),
      sampling=Sampling(zero, none, zero, zero, zero),
      limits=none,
      fed=none,
      slots=slots,
    ),
  )
  return _pinned(state)


@functools.partial(
  jax.jit, static_argnames=("config",), donate_argnames=("state",)
)
def read_into(
  policy: Params,
  state: Slots,
  tokens: jax.Array,
  lengths: jax.Array,
  groups: jax.Array,
  *,
  config: ModelConfig,
) -> Slots:
  """Reads prompts into groups of which no row is active.

  Args:
    policy: the model.
    state: before.
    tokens: i32[A, W], W at most S.
    lengths: i32[A].
    groups: i32[A], where each goes; G for a row that only fills the shape.
    config: the policy's architecture.
  """
  _, read = read_prompts(policy, tokens, lengths - 1, config)
  width = tokens.shape[1]

  def put(pool: jax.Array, new: jax.Array) -> jax.Array:
    new = new.astype(pool.dtype)
    return pool.at[:, groups, :, :width].set(new, mode="drop")

  def put_lengths(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[groups].set(new, mode="drop")

  cache = jax.tree.map(put, state.shared.cache, read.cache)
  state = state._replace(
    prompts=Text(
      state.prompts.tokens.at[groups, :width].set(tokens, mode="drop"),
      put_lengths(state.prompts.lengths, lengths),
    ),
    shared=Shared(cache, put_lengths(state.shared.lengths, read.lengths)),
  )
  return _pinned(state)


@functools.partial(
  jax.jit, static_argnames=("config", "eos_ids"), donate_argnames=("state",)
)
def turn(
  policy: Params,
  state: Slots,
  begin: Begin,
  key: jax.Array,
  stops: Stops | None,
  most_steps: jax.Array,
  enough: jax.Array,
  *,
  config: ModelConfig,
  eos_ids: tuple[int, ...],
) -> tuple[Slots, Report]:
  """Lets rows begin and all active ones grow.

  Args:
    policy: the model.
    state: before.
    begin: of R rows.
    key: of all draws.
    stops: strings that end an answer, if any.
    most_steps: i32[], tokens to add to a row.
    enough: i32[], the turn ends when no more rows than that are active.
    config: the policy's architecture.
    eos_ids: tokens that end an answer.

  Returns:
    The state after, and a report.
  """
  rows = state.rows
  fresh = start_rows(
    config,
    keys=row_keys(key, begin.problems, begin.samples),
    sampling=begin.sampling,
    limits=jnp.asarray(begin.limits),
    fed=jnp.asarray(begin.fed),
    slots=rows.tokens.shape[1],
  )

  def choose(new: jax.Array, old: jax.Array) -> jax.Array:
    begins = begin.begins.reshape(-1, *(1,) * (new.ndim - 1))
    return jnp.where(begins, new, old)

  # The ring goes round for all rows together, and what it holds of a row's
  # earlier answer is out of reach of one that has no tokens yet.
  names = [name for name in Rows._fields if name not in ("steps", "cache")]
  chosen: Any = jax.tree.map(
    choose,
    [getattr(fresh, name) for name in names],
    [getattr(rows, name) for name in names],
  )
  rows = rows._replace(**dict(zip(names, chosen, strict=True)))
  rows = grow(
    policy,
    (state.shared,),
    (state.prompts,),
    rows,
    config,
    eos_ids=eos_ids,
    stops=stops,
    most_steps=most_steps,
    enough=enough,
  )
  return _pinned(state._replace(rows=rows)), Report(rows.active, rows.steps)


@jax.jit
def take_rows(state: Slots, index: jax.Array) -> Ended:
  """Takes out what rows i32[N] hold."""
  rows = state.rows
  taken = (
    rows.tokens,
    rows.lengths,
    rows.finished,
    rows.step_ended,
    rows.logps,
  )
  return Ended(*(jnp.take(x, index, axis=0, mode="clip") for x in taken))
