"""Models over caches: texts are read once, and grow from there.

The functions here run the same layers as `functional.apply`, but keep their
keys and values. See `cache.py` for the levels in which they are held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from oreo_jax.config import ModelConfig
from oreo_jax.models import attention, cache
from oreo_jax.models.cache import Cache, Shared
from oreo_jax.models.decoder import Decoder
from oreo_jax.models.functional import Output, check_depth
from oreo_jax.models.packed_attention import attend_packed
from oreo_jax.models.shared_layers import has_trunk
from oreo_jax.models.skeleton import Params, count_layers, module, unstacked

# (carry, layer's index, that layer of the caches that are only read, and what
# an `Attend` takes) -> (mixed values, the carry, what the layer made).
AttendCached = Callable[..., tuple[jax.Array, Any, Any]]


def prefill(
  params: Params,
  tokens: jax.Array,
  config: ModelConfig,
  *,
  lengths: jax.Array,
  start: jax.Array | None = None,
  stream_at: int | None = None,
) -> Output:
  """Reads texts from their start, and keeps their keys and values.

  Networks with a trunk in common run it once: the one whose weights it is gives
  its stream (`stream_at`), from which the other's `layers_above` start.

  Args:
    params: as `init` or `unstack_layers` returns them.
    tokens: i32[B, T], left-aligned.
    config: the architecture.
    lengths: i32[B], tokens of each row; what is behind them is padding, and
      what the cache holds of it is rubbish.
    start: [B, T, D], what enters the first of the layers in place of the
      embedding of the tokens.
    stream_at: also return what enters this layer, in [1, L]; L is what the
      final norm reads.

  Returns:
    Output(hidden [B, T, D], a cache [L, B, K, T, H], the stream).
  """
  index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  inside = (index < lengths[:, None]).astype(jnp.int32)
  packed = attend_packed(config, inside)

  def attend(
    unused_carry: None,
    unused_layer: jax.Array | int,
    unused_levels: list[Cache],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
  ) -> tuple[jax.Array, None, Cache]:
    mixed = packed(query, key, value, scale)
    return mixed, None, cache.entries(key, value, config)

  positions = jnp.broadcast_to(index, tokens.shape)
  hidden, stream, _, made = _run(
    params, tokens, config, positions, attend, start=start, stream_at=stream_at
  )
  return Output(hidden, made, stream)


def apply_branches(
  params: Params,
  tokens: jax.Array,
  config: ModelConfig,
  *,
  shared: tuple[Shared, ...],
  local: Cache,
  slot: jax.Array | int,
  counts: jax.Array | None = None,
  start: jax.Array | None = None,
  stream_at: int | None = None,
) -> Output:
  """Continues R rows of which several share their older text.

  Shared text is read where it lies, once for all its rows, and never copied; a
  row keeps its own tokens in a small cache. See `models.cache` for the levels
  and for the ring.

  Args:
    params: as `init` or `unstack_layers` returns them.
    tokens: i32[R, T], rows that share a text side by side.
    config: the architecture.
    shared: levels of the older text, the oldest first; the number of texts of
      each divides R.
    local: of `init_cache(config, R, M)`, where T is at most M.
    slot: i32[], where `tokens` go in `local`, the same for all rows; T slots
      from there on must be inside it.
    counts: i32[R], how many tokens each row has in `local`, in the slots before
      `slot` and, behind slot 0, at its end; at most M - T. By default `slot`
      for all: rows that started together at slot 0.
    start: [R, T, D], as in `prefill`.
    stream_at: as in `prefill`.

  Returns:
    Output(hidden [R, T, D], the updated local cache, the stream).
  """
  slot = jnp.asarray(slot, jnp.int32)
  if counts is None:
    counts = jnp.broadcast_to(slot, tokens.shape[:1])
  positions, masks = cache.branch_layout(
    shared,
    local.slots,
    slot=slot,
    counts=counts,
    length=tokens.shape[1],
    sliding_window=config.sliding_window,
  )

  def attend(
    local: Cache,
    layer: jax.Array | int,
    levels: list[Cache],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
  ) -> tuple[jax.Array, Cache, None]:
    new = cache.entries(key, value, config)
    local = cache.put(local, new, layer, slot)
    mixed = attention.attend_levels(
      query, [*levels, cache.layer_of(local, layer)], masks, scale=scale
    )
    return mixed, local, None

  levels = [level.cache for level in shared]
  hidden, stream, local, _ = _run(
    params,
    tokens,
    config,
    positions,
    attend,
    local,
    levels,
    start=start,
    stream_at=stream_at,
  )
  return Output(hidden, local, stream)


def _run(
  params: Params,
  tokens: jax.Array,
  config: ModelConfig,
  positions: jax.Array,
  attend: AttendCached,
  carry: Any = None,
  levels: Sequence[Cache] = (),
  *,
  start: jax.Array | None,
  stream_at: int | None,
) -> tuple[jax.Array, jax.Array | None, Any, Any]:
  """Runs the layers over caches, in a scan or one after the other.

  Args:
    params: as `init` or `unstack_layers` returns them.
    tokens: i32[B, T].
    config: the architecture.
    positions: i32[B, T].
    attend: see `AttendCached`.
    carry: a tree of arrays that every layer may write.
    levels: caches that are only read.
    start: [B, T, D], what enters the first layer; None: the embedding.
    stream_at: the layer before which to keep the stream.

  Returns:
    The hidden states [B, T, D], the stream there or None, the carry, and what
    the layers made, as a `Cache` has its layers.
  """
  if has_trunk(params):
    raise ValueError(
      "params: these of `share_trunk` have no first layers; take "
      "`layers_above` of them, with `start`"
    )
  count = config.num_layers
  if count_layers(params) != count:
    raise ValueError(
      f"config.num_layers: expected {count_layers(params)}, the layers of "
      f"`params`, got {count}"
    )
  if config.layers_apart != (unstacked(params) is not None):
    raise ValueError(
      f"config.layers_apart is {config.layers_apart}, and the layers of "
      "`params` are not so: take both from `unstack_layers`"
    )
  model = module(params, config)
  x = model.embed(tokens) if start is None else start.astype(config.dtype)
  if stream_at is None:
    x, carry, made = _run_layers(
      model, params, positions, attend, (0, count), x, carry, levels
    )
    return model.final_norm(x), None, carry, made
  check_depth("stream_at", stream_at, config)
  # Two loops rather than one that looks where it is: of a caller that reads the
  # stream alone the compiler leaves the second one out.
  stream, carry, below = _run_layers(
    model, params, positions, attend, (0, stream_at), x, carry, levels
  )
  x, carry, above = _run_layers(
    model, params, positions, attend, (stream_at, count), stream, carry, levels
  )
  made = jax.tree.map(
    lambda x, y: x + y if type(x) is tuple else jnp.concatenate([x, y]),
    below,
    above,
    is_leaf=lambda x: type(x) is tuple,
  )
  return model.final_norm(x), stream, carry, made


def _run_layers(
  model: Decoder,
  params: Params,
  positions: jax.Array,
  attend: AttendCached,
  layers: tuple[int, int],
  x: jax.Array,
  carry: Any,
  levels: Sequence[Cache],
) -> tuple[jax.Array, Any, Any]:
  """Runs the layers first, ..., last - 1; returns x, the carry, and the made.

  A cache that is written is carried, not scanned over: the loop then updates
  it in place instead of stacking a new one. What is only read, weights and
  `levels`, is taken a layer at a time from where it lies: a part of it that is
  scanned over would be copied.
  """
  graph, stacked = nnx.split(model.layers)
  rotary = model.rotary(positions)
  each = unstacked(params)

  def layer(
    carry: tuple[jax.Array, Any], index: jax.Array | int, weights: nnx.State
  ) -> tuple[tuple[jax.Array, Any], Any]:
    x, written = carry
    made = None
    here = [cache.layer_of(level, index) for level in levels]

    # A block hands on the mixed values alone, so what else there is leaves it
    # by this side door; the block calls it once.
    def attend_and_write(
      query: jax.Array, key: jax.Array, value: jax.Array, scale: float
    ) -> jax.Array:
      nonlocal written, made
      mixed, written, made = attend(
        written, index, here, query, key, value, scale
      )
      return mixed

    x = nnx.merge(graph, weights)(x, rotary, attend_and_write)
    return (x, written), made

  if each is None:
    (x, carry), made = jax.lax.scan(
      lambda carry, index: layer(carry, index, cache.layer_of(stacked, index)),
      (x, carry),
      jnp.arange(*layers, dtype=jnp.int32),
      unroll=model.config.unroll,
    )
    return x, carry, made
  each_made = []
  for number in range(*layers):
    weights = jax.tree.map(lambda leaf: leaf, stacked)
    nnx.replace_by_pure_dict(weights, each[number])
    (x, carry), made = layer((x, carry), number, weights)
    each_made.append(made)
  made = jax.tree.map(lambda *each: tuple(x[None] for x in each), *each_made)
  return x, carry, made
