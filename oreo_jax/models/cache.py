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

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp

from oreo_jax.config import INT8, ModelConfig
from oreo_jax.models.quantize import quantize
from oreo_jax.sharding import constrain_batch

Tree = TypeVar("Tree")


class Cache(NamedTuple):
  """Keys and values of every layer: [L, B, K, S, H].

  Heads stand before slots, so that the keys of one head are one matrix. Take
  all arrays of it together with `jax.tree.map`: scales have the same dimensions
  but the last, and may be absent. With `config.layers_apart` a field is a tuple
  of L arrays, whose first dimension is 1.
  """

  keys: Any
  values: Any
  # f32[L, B, K, S], with which int8 keys and values are multiplied.
  key_scales: Any = None
  value_scales: Any = None

  @property
  def slots(self) -> int:
    """Returns S."""
    return jax.tree.leaves(self.keys)[0].shape[-2]


class Shared(NamedTuple):
  """A level of P texts, each of which is shared by R / P rows side by side."""

  cache: Cache  # [L, P, K, S, H]; slot s holds token s of the level
  lengths: jax.Array  # i32[P], slots that are filled


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
  """Returns an empty cache for `batch` rows of at most `slots` tokens."""
  shape = (batch, config.num_kv_heads, slots, config.head_dim)
  count = config.num_layers

  def zeros(shape: tuple[int, ...], dtype: str) -> Any:
    if config.layers_apart:
      return tuple(jnp.zeros((1, *shape), dtype) for _ in range(count))
    return jnp.zeros((count, *shape), dtype)

  if config.cache_dtype == INT8:
    kept = [(shape, INT8)] * 2 + [(shape[:-1], "float32")] * 2
  else:
    kept = [(shape, config.dtype)] * 2
  return constrain_cache(Cache(*(zeros(*each) for each in kept)))


def constrain_cache(cache: Cache) -> Cache:
  """Pins rows to the batch axes of the mesh, and heads to `tensor`.

  A device then holds the keys of the heads that it computes, and nothing of a
  cache is gathered.
  """
  return jax.tree.map(lambda x: constrain_batch(x, dim=1, heads=2), cache)


def entries(key: jax.Array, value: jax.Array, config: ModelConfig) -> Cache:
  """Returns what a layer keeps of new tokens: arrays [R, K, T, ...].

  Args:
    key: [R, T, K, H].
    value: [R, T, K, H].
    config: says in which dtype they are kept.
  """
  key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
  if config.cache_dtype != INT8:
    return Cache(key, value)
  # One scale a token and head: what was written before stays as it is.
  keys, key_scales = quantize(key, -1)
  values, value_scales = quantize(value, -1)
  return Cache(keys, values, key_scales, value_scales)


def carried(cache: Cache) -> Cache:
  """Returns a cache for a loop to carry and `apply_branches` to write.

  With layers apart its arrays have no layer dimension there: what a CPU's loop
  carries in one shape and reads in another is copied every time. `resting` is
  the inverse.
  """
  return _each(lambda x: x[0], cache)


def resting(cache: Cache) -> Cache:
  """Returns the cache that a loop has carried, as it was before."""
  return _each(lambda x: x[None], cache)


def _each(change: Callable[[jax.Array], jax.Array], cache: Cache) -> Cache:
  """Changes every array of layers that are apart."""
  return Cache(
    *(
      tuple(change(x) for x in field) if type(field) is tuple else field
      for field in cache
    )
  )


def layer_of(stacked: Tree, layer: jax.Array | int) -> Tree:
  """Returns one layer of a cache, or of weights in one stack.

  A loop that takes each layer where it lies copies nothing; a loop over a part
  of the layers, cut out for it, copies that part.

  Args:
    stacked: a cache, or a tree of arrays with a leading layer dimension.
    layer: which one; an int for a cache whose layers are apart.

  Returns:
    The same tree without that dimension.
  """
  if isinstance(stacked, Cache) and type(stacked.keys) is tuple:
    index = cast(int, layer)
    # One that a loop carries has no layer dimension.
    whole = stacked if stacked.keys[0].ndim == 4 else carried(stacked)
    return cast(Tree, Cache(*(x and x[index] for x in whole)))
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stacked
  )


def put(
  cache: Cache, new: Cache, layer: jax.Array | int, slot: jax.Array
) -> Cache:
  """Writes T `entries` into one layer's slots slot, ..., slot + T - 1."""

  def write(old: Any, new: jax.Array) -> Any:
    if type(old) is tuple:
      written = write_at(old[layer], new, 0)
      return (*old[:layer], written, *old[layer + 1 :])
    return write_at(old, new, layer)

  def write_at(
    old: jax.Array, new: jax.Array, layer: jax.Array | int
  ) -> jax.Array:
    start = [layer, 0, 0, slot, 0][: new.ndim + 1]
    if old.ndim == new.ndim:  # of `carried`
      start = start[1:]
    else:
      new = new[None]
    return jax.lax.dynamic_update_slice(
      old, new.astype(old.dtype), [jnp.asarray(i, "int32") for i in start]
    )

  return Cache(
    *(
      None if old is None else write(old, each)
      for old, each in zip(cache, new, strict=True)
    )
  )


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
    key = jnp.arange(level.cache.slots, dtype=jnp.int32)[None]
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
