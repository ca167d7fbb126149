"""Rows that grow: the loop that adds a token to every row, over and over.

Generation, the engine and every search run this one loop. Rows may have begun
at different times, and each has its own key, settings and limit, so what a row
draws depends on nothing but itself.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.sampling import Sampling, draw
from oreo_jax.decode.stops import Stops
from oreo_jax.decode.stops import advance as read_stops
from oreo_jax.models import Cache, Params, Shared
from oreo_jax.sharding import constrain_batch


class Rows(NamedTuple):
  """R rows, those that share a text side by side."""

  keys: jax.Array  # key[R], of `sampling.row_keys`
  sampling: Sampling  # of R rows
  limits: jax.Array  # i32[R], most tokens of each; at most M
  fed: jax.Array  # i32[R], the last token, which is read next
  tokens: jax.Array  # i32[R, M], new tokens; rubbish beyond `lengths`
  logps: jax.Array  # f32[R, M], log pi of each new token
  lengths: jax.Array  # i32[R], new tokens
  finished: jax.Array  # bool[R], the last one is an end-of-sequence
  step_ended: jax.Array  # bool[R], the last one ends a step
  stop_state: jax.Array  # i32[R], where the automaton of the stops is
  active: jax.Array  # bool[R]; others only fill the shape
  steps: jax.Array  # i32[], of the loop so far
  # Of M slots, a ring (see `models.cache`) in which step i writes slot i % M:
  # all tokens that were fed.
  cache: Cache
  # [R, M, D], what the policy's layer `stream_at` was given of each of them, in
  # the same slots; None where nobody asks for it. `grow_first` writes none.
  stream: jax.Array | None = None


class Text(NamedTuple):
  """Tokens of a level of P texts, as in `models.Shared`."""

  tokens: jax.Array  # i32[P, S]
  lengths: jax.Array  # i32[P]


def start_rows(
  config: ModelConfig,
  *,
  keys: jax.Array,
  sampling: Sampling,
  limits: jax.Array,
  fed: jax.Array,
  slots: int,
  stop_state: jax.Array | None = None,
  keeps_stream: bool = False,
) -> Rows:
  """Returns rows without a new token.

  Args:
    config: the policy's architecture.
    keys: key[R], of the draws.
    sampling: how each row is drawn.
    limits: i32[R], most tokens of each row; a row of 0 is not active.
    fed: i32[R], the last token of the text that each row continues.
    slots: M.
    stop_state: i32[R], of the automaton at that token; its start by default.
    keeps_stream: whether `grow` keeps the stream at a layer.
  """
  rows = fed.shape[0]
  none = jnp.zeros(rows, bool)
  stream = None
  if keeps_stream:
    stream = constrain_batch(
      jnp.zeros((rows, slots, config.embed_dim), config.dtype)
    )
  return Rows(
    keys=keys,
    sampling=sampling,
    limits=jnp.minimum(limits, slots),
    fed=fed,
    tokens=jnp.zeros((rows, slots), jnp.int32),
    logps=jnp.zeros((rows, slots), jnp.float32),
    lengths=jnp.zeros(rows, jnp.int32),
    finished=none,
    step_ended=none,
    stop_state=jnp.zeros_like(fed) if stop_state is None else stop_state,
    active=limits > 0,
    steps=jnp.zeros((), jnp.int32),
    cache=models.init_cache(config, rows, slots),
    stream=stream,
  )


def grow(
  policy: Params,
  shared: tuple[Shared, ...],
  texts: tuple[Text, ...],
  rows: Rows,
  config: ModelConfig,
  *,
  eos_ids: tuple[int, ...],
  stops: Stops | None = None,
  most_steps: jax.Array | int | None = None,
  enough: jax.Array | int = 0,
  stream_at: int | None = None,
) -> Rows:
  """Adds tokens to all active rows, in one `while_loop`.

  A row ends after an end-of-sequence token, after the token that ends its step,
  or at its limit. What rows share is only read, once a token for all of them.

  Args:
    policy: what tokens are drawn from.
    shared: levels of older text, the oldest first.
    texts: the tokens of these levels, for the repetition penalty; may be empty
      where no row has one.
    rows: R of them.
    config: the policy's architecture.
    eos_ids: tokens that end an answer.
    stops: where a step ends; None: go on to the end.
    most_steps: i32[], tokens to add to a row; M by default.
    enough: i32[], the loop ends when no more rows than that are active.
    stream_at: the layer whose input `Rows.stream` keeps, where it is kept.

  Returns:
    The rows, later.
  """
  slots = rows.tokens.shape[1]
  most_steps = slots if most_steps is None else most_steps

  def unfinished(carry: tuple[jax.Array, Rows]) -> jax.Array:
    step, rows = carry
    active = jnp.sum(rows.active.astype(jnp.int32))
    return (step < most_steps) & (active > enough)

  def body(carry: tuple[jax.Array, Rows]) -> tuple[jax.Array, Rows]:
    step, rows = carry
    return step + 1, _add_token(
      policy,
      shared,
      texts,
      rows,
      config,
      eos_ids=eos_ids,
      stops=stops,
      stream_at=stream_at,
    )

  rows = rows._replace(cache=models.carried(rows.cache))
  start = (jnp.zeros((), jnp.int32), rows)
  rows = jax.lax.while_loop(unfinished, body, start)[1]
  return rows._replace(cache=models.resting(rows.cache))


def grow_first(
  policy: Params,
  shared: tuple[Shared, ...],
  texts: tuple[Text, ...],
  rows: Rows,
  config: ModelConfig,
  *,
  eos_ids: tuple[int, ...],
  stops: Stops | None = None,
) -> Rows:
  """Adds the first token to rows that branch off the texts of the last level.

  Rows that share such a text are fed the same token, which is read once for all
  of them; `grow` would read it again for every one.

  Args:
    policy: what tokens are drawn from.
    shared: levels of older text, at least one.
    texts: as in `grow`.
    rows: of `start_rows`.
    config: the policy's architecture.
    eos_ids: tokens that end an answer.
    stops: where a step ends.

  Returns:
    The rows, each with one token more.
  """
  count = rows.fed.shape[0]
  share = count // shared[-1].lengths.shape[0]
  out = models.apply_branches(
    policy,
    rows.fed[::share, None],
    config,
    shared=shared,
    local=models.init_cache(config, count // share, 1),
    slot=0,
  )
  logits = models.logits(policy, out.hidden[:, 0], config)
  # It gives a cache back because it got one.
  read = cast(Cache, out.cache)
  cache = jax.tree.map(
    lambda x, new: jax.lax.dynamic_update_slice_in_dim(
      x, jnp.repeat(new, share, axis=1), 0, axis=3
    ),
    rows.cache,
    read,
  )
  return _draw_token(
    rows._replace(cache=cache),
    jnp.repeat(logits, share, axis=0),
    texts,
    eos_ids=eos_ids,
    stops=stops,
  )


def _add_token(
  policy: Params,
  shared: tuple[Shared, ...],
  texts: tuple[Text, ...],
  rows: Rows,
  config: ModelConfig,
  *,
  eos_ids: tuple[int, ...],
  stops: Stops | None,
  stream_at: int | None,
) -> Rows:
  """Feeds every row its last token and draws the next one."""
  slot = rows.steps % rows.tokens.shape[1]
  out = models.apply_branches(
    policy,
    rows.fed[:, None],
    config,
    shared=shared,
    local=rows.cache,
    slot=slot,
    counts=rows.lengths,
    stream_at=None if rows.stream is None else stream_at,
  )
  logits = models.logits(policy, out.hidden[:, 0], config)
  # It gives a cache back because it got one.
  rows = rows._replace(cache=cast(Cache, out.cache))
  if rows.stream is not None and out.stream is not None:
    stream = jax.lax.dynamic_update_slice_in_dim(
      rows.stream, out.stream, slot, axis=1
    )
    rows = rows._replace(stream=stream)
  return _draw_token(rows, logits, texts, eos_ids=eos_ids, stops=stops)


def _draw_token(
  rows: Rows,
  logits: jax.Array,
  texts: tuple[Text, ...],
  *,
  eos_ids: tuple[int, ...],
  stops: Stops | None,
) -> Rows:
  """Draws the next token of every row, after its last one was fed."""
  slots = rows.tokens.shape[1]
  token, logp = draw(
    rows.keys, rows.lengths, logits, rows.sampling, *_so_far(texts, rows)
  )
  eos = jnp.asarray(eos_ids, jnp.int32)
  ended = jnp.any(token[:, None] == eos[None], axis=1)
  stop_state, stopped = rows.stop_state, jnp.zeros_like(ended)
  if stops is not None:
    after, stopped = read_stops(stops, stop_state, token)
    stop_state = jnp.where(rows.active, after, stop_state)
  # Each row writes a column of its own. Comparing all columns is cheaper than
  # it looks, and it is split over devices without any exchange.
  column = jnp.arange(slots, dtype=jnp.int32)[None]
  here = (column == rows.lengths[:, None]) & rows.active[:, None]
  lengths = rows.lengths + rows.active.astype(jnp.int32)
  return rows._replace(
    fed=jnp.where(rows.active, token, rows.fed),
    tokens=jnp.where(here, token[:, None], rows.tokens),
    logps=jnp.where(here, logp[:, None], rows.logps),
    lengths=lengths,
    finished=rows.finished | (rows.active & ended),
    step_ended=rows.step_ended | (rows.active & stopped),
    stop_state=stop_state,
    active=rows.active & ~ended & ~stopped & (lengths < rows.limits),
    steps=rows.steps + 1,
  )


def _so_far(
  texts: tuple[Text, ...], rows: Rows
) -> tuple[jax.Array | None, jax.Array | None]:
  """Returns (i32[R, T], bool[R, T]): the tokens of each row, all levels."""
  if not texts:
    return None, None
  count = rows.fed.shape[0]
  tokens, inside = [], []
  for text in (*texts, Text(rows.tokens, rows.lengths)):
    share = count // text.lengths.shape[0]
    index = jnp.arange(text.tokens.shape[1], dtype=jnp.int32)[None]
    tokens.append(jnp.repeat(text.tokens, share, axis=0))
    inside.append(jnp.repeat(index < text.lengths[:, None], share, axis=0))
  return jnp.concatenate(tokens, axis=1), jnp.concatenate(inside, axis=1)
