"""Texts that grow: prompts, what is sampled behind them, and their caches.

Texts of different lengths are left-aligned: token i of a row is at position i
and in cache slot i. What grows from a text, samples of a prompt or proposals of
a beam, shares the cache of its prefix and keeps its own tokens in a small one,
so that a step writes one slot and the long part is read once for all branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.models import Cache, Params
from oreo_jax.sharding import constrain_batch

# Token ids of each prompt, ragged, or all of one length.
Prompts = Sequence[Sequence[int]] | Sequence[np.ndarray] | np.ndarray


class Prefix(NamedTuple):
  """What P rows hold so far, left-aligned: prompts, or beams of a search."""

  tokens: jax.Array  # i32[P, S]; rubbish beyond `lengths`
  lengths: jax.Array  # i32[P]
  logps: jax.Array  # f32[P, S], log pi of each generated token, 0 elsewhere
  stop_state: jax.Array  # i32[P], where the automaton of the stops is
  # Keys and values of all tokens but the last one, which is fed next.
  cache: Cache


class Branches(NamedTuple):
  """R = P * branches continuations, those of a prefix side by side."""

  tokens: jax.Array  # i32[R, M], new tokens; rubbish beyond `lengths`
  lengths: jax.Array  # i32[R], new tokens
  finished: jax.Array  # bool[R], the last one is an end-of-sequence
  logps: jax.Array  # f32[R, M], log pi of each new token
  step_ended: jax.Array  # bool[R], the last one ends a step
  stop_state: jax.Array  # i32[R], where the automaton of the stops is
  cache: Cache  # slot 0: the prefix's last token; slot j + 1: new token j


def pad_prompts(
  prompts: Prompts, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts as (tokens i32[R, P], lengths i32[R]), left-aligned.

  Args:
    prompts: token ids, none empty.
    length: P; by default the longest prompt.

  Raises:
    ValueError: if a prompt is empty or longer than `length`.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  if not len(lengths) or not lengths.min():
    raise ValueError("prompts: every prompt needs at least one token")
  length = int(lengths.max()) if length is None else length
  if lengths.max() > length:
    row = int(lengths.argmax())
    raise ValueError(
      f"prompts: prompt {row} has {lengths[row]} tokens, room is {length}"
    )
  tokens = np.zeros((len(prompts), length), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  return tokens, lengths


def prefill(
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  config: ModelConfig,
  slots: int,
) -> tuple[jax.Array, Cache]:
  """Writes the first `lengths` tokens of each prompt into a fresh cache.

  Args:
    params: of a policy or a value network.
    prompts: i32[P, W].
    lengths: i32[P], tokens of each row that are written.
    config: the architecture.
    slots: S of the cache.

  Returns:
    (hidden [P, W, D], the cache).
  """
  index = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None]
  positions = jnp.where(index < lengths[:, None], index, -1)
  cache = models.init_cache(config, prompts.shape[0], slots)
  cache = models.Cache(*(constrain_batch(x, dim=1) for x in cache))
  out = models.apply(params, prompts, config, positions=positions, cache=cache)
  # It gives a cache back because it got one.
  return out.hidden, cast(Cache, out.cache)


def read_prompts(
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  config: ModelConfig,
  *,
  room: int = 0,
) -> Prefix:
  """Prefills prompts [P, W] into rows with room for `room` more tokens."""
  prompts, lengths = constrain_batch(prompts), constrain_batch(lengths)
  # The last token is left to the first decoding step, so that every step, the
  # first included, feeds one token and reads one distribution.
  slots = prompts.shape[1] + room
  _, cache = prefill(params, prompts, lengths - 1, config, slots)
  return Prefix(
    tokens=jnp.pad(prompts, ((0, 0), (0, room))),
    lengths=lengths,
    logps=jnp.zeros((prompts.shape[0], slots), jnp.float32),
    stop_state=jnp.zeros_like(lengths),
    cache=cache,
  )


def take_prefix(prefix: Prefix, index: jax.Array) -> Prefix:
  """Returns the rows i32[N] of some prefixes, with their caches."""
  return Prefix(
    tokens=prefix.tokens[index],
    lengths=prefix.lengths[index],
    logps=prefix.logps[index],
    stop_state=prefix.stop_state[index],
    cache=take_cache(prefix.cache, index),
  )


def take_cache(cache: Cache, index: jax.Array) -> Cache:
  """Returns the rows i32[N] of a cache, whose first dimension is the layer."""
  return Cache(*(jnp.take(x, index, axis=1) for x in cache))


def append_branches(
  prefix: Prefix, grown: Branches, parents: jax.Array, chosen: jax.Array
) -> Prefix:
  """Returns some branches as prefixes, behind the tokens they grew from.

  Args:
    prefix: P rows.
    grown: branches of them.
    parents: i32[N], the row of `prefix` that each chosen branch grew from.
    chosen: i32[N], the rows of `grown`.

  Returns:
    N rows.
  """
  old = take_prefix(prefix, parents)
  count = grown.lengths[chosen]
  return Prefix(
    tokens=_write(old.tokens, grown.tokens[chosen], old.lengths, count),
    lengths=old.lengths + count,
    logps=_write(old.logps, grown.logps[chosen], old.lengths, count),
    stop_state=grown.stop_state[chosen],
    # Slot 0 of a branch holds the last token of the prefix, which the cache of
    # the prefix does not have yet: the branch is written from there on.
    cache=append_cache(
      old.cache, take_cache(grown.cache, chosen), old.lengths - 1, count
    ),
  )


def append_cache(
  old: Cache, new: Cache, start: jax.Array, count: jax.Array
) -> Cache:
  """Writes the first `count` slots of `new` into `old`, from `start` on.

  Args:
    old: of N rows and S slots.
    new: of N rows and M slots.
    start: i32[N], the first slot of each row that is written.
    count: i32[N], how many slots.
  """
  write = jax.vmap(_write, in_axes=(0, 0, None, None))  # over the layers
  return Cache(
    *(write(x, y, start, count) for x, y in zip(old, new, strict=True))
  )


def _write(
  old: jax.Array, new: jax.Array, start: jax.Array, count: jax.Array
) -> jax.Array:
  """Writes the first `count` of new [N, M, ...] into old [N, S, ...]."""
  offsets = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
  inside = offsets < count[:, None]
  # What must not be written is sent to the slot S, and dropped there.
  place = jnp.where(inside, start[:, None] + offsets, old.shape[1])
  rows = jnp.arange(old.shape[0])[:, None]
  return old.at[rows, place].set(new.astype(old.dtype), mode="drop")
