"""Caches of keys and values, and the texts that branches share.

A text that grows is kept in levels, the oldest first: the prompt that several
samples or beams have in common, what a beam has added to it, and the new tokens
of every branch. A level is held once for all rows that share it, however many
they are, and is read where it lies.

The newest level, `local`, is written as a ring: in one step every row writes
the same slot. Rows may start at different times, so what a row has written are
the last slots before that one, as many as its count says. A common slot keeps
the write one plain slice on every device, where one slot a row would be a
scatter. The order of slots means nothing to attention, because a key carries
its position in its rotation.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax.config import ModelConfig
from oreo_jax.sharding import constrain_batch


class Cache(NamedTuple):
  """Keys and values of every layer: [L, B, K, S, H].

  Heads stand before slots, so that the keys of one head are one matrix.
  """

  keys: jax.Array
  values: jax.Array


class Shared(NamedTuple):
  """A level of P texts, each of which is shared by R / P rows side by side."""

  cache: Cache  # [L, P, K, S, H]; slot s holds token s of the level
  lengths: jax.Array  # i32[P], slots that are filled


def init_cache(
  config: ModelConfig, batch: int, slots: int, dtype: str | None = None
) -> Cache:
  """Returns an empty cache for `batch` rows of at most `slots` tokens."""
  shape = (
    config.num_layers,
    batch,
    config.num_kv_heads,
    slots,
    config.head_dim,
  )
  empty = jnp.zeros(shape, dtype or config.dtype)
  return constrain_cache(Cache(empty, jnp.copy(empty)))


def constrain_cache(cache: Cache) -> Cache:
  """Pins rows to the batch axes of the mesh, and heads to `tensor`.

  A device then holds the keys of the heads that it computes, and nothing of a
  cache is gathered.
  """
  return Cache(*(constrain_batch(x, dim=1, heads=2) for x in cache))


def put(cache: jax.Array, new: jax.Array, layer: jax.Array, slot: jax.Array):
  """Writes new [R, T, K, H] into one layer's slots slot, ..., slot + T - 1."""
  start = [jnp.asarray(i, jnp.int32) for i in (layer, 0, 0, slot, 0)]
  new = jnp.swapaxes(new, 1, 2)[None].astype(cache.dtype)
  return jax.lax.dynamic_update_slice(cache, new, start)


def layer_of(
  cache: Cache, layer: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
  """Returns one layer's keys and values, cast for computing."""
  keys, values = (
    jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).astype(dtype)
    for x in cache
  )
  return keys, values


def branch_layout(
  shared: tuple[Shared, ...],
  slots: int,
  *,
  slot: jax.Array,
  counts: jax.Array,
  length: int,
  sliding_window: int,
) -> tuple[jax.Array, list[jax.Array]]:
  """Returns where new tokens of branches are, and which keys they see.

  Args:
    shared: the levels above the local one, the oldest first.
    slots: M of the local level.
    slot: i32[], where the first of the new tokens goes.
    counts: i32[R], tokens that each row has in the local level already.
    length: T, new tokens of a row.
    sliding_window: of the model; 0 is none.

  Returns:
    (positions i32[R, T], a mask bool[R, T, S] a level, the local one last).
  """
  rows = counts.shape[0]
  offsets = jnp.arange(length, dtype=jnp.int32)[None]
  # Where each level begins in the text of a row.
  begins = [jnp.zeros(rows, jnp.int32)]
  for level in shared:
    share = rows // level.lengths.shape[0]
    begins.append(begins[-1] + jnp.repeat(level.lengths, share))
  positions = (begins[-1] + counts)[:, None] + offsets
  masks = []
  for level, begin, end in zip(shared, begins, begins[1:], strict=False):
    key = jnp.arange(level.cache.keys.shape[3], dtype=jnp.int32)[None]
    place = begin[:, None] + key
    mask = jnp.broadcast_to(
      (place < end[:, None])[:, None], (rows, length, key.size)
    )
    if sliding_window:
      mask &= positions[..., None] - place[:, None] < sliding_window
    masks.append(mask)
  # How many tokens ago a slot was written, seen from each new token: 0 is the
  # token itself, and what is not yet written counts as the longest ago.
  key = jnp.arange(slots, dtype=jnp.int32)[None]
  age = ((slot + offsets).T - key)[None] % slots
  mask = age <= (counts[:, None] + offsets)[..., None]
  if sliding_window:
    mask &= age < sliding_window
  return positions, [*masks, mask]
