"""Rotary positions, masks and grouped-query attention.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head
width, G = N/K queries that share a key.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from oreo_jax.models.cache import Cache

# Names what the backward pass of an attention needs of its forward pass, for
# policies of rematerialisation that keep it.
MIXED = "mixed values"

_FEW_QUERIES = 8  # of one text and key head

# (query [B, T, N, H], key, value [B, T, K, H], scale) -> mixed [B, T, N, H].
Attend = Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]


def rotary_angles(
  positions: jax.Array,
  *,
  head_dim: int,
  theta: float,
  scaling: tuple = (),
) -> tuple[jax.Array, jax.Array]:
  """Returns cos and sin of the rotary angles.

  Args:
    positions: i32[B, T], position of each token in its sequence.
    head_dim: H, even.
    theta: base of the frequencies.
    scaling: empty, or Llama 3's (factor, low_freq_factor, high_freq_factor,
      original_length): wavelengths beyond original_length/low_freq_factor are
      stretched by `factor`, those under original_length/high_freq_factor stay
      as they are, and between them the two are blended.

  Returns:
    cos, sin: f32[B, T, 1, H/2]; float32, as bf16 positions lose whole tokens.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency = 1.0 / theta**exponent
  if scaling:
    factor, low, high, original = scaling
    turns = original * frequency / (2 * math.pi)
    # 1 where a wavelength turns often enough to stay, 0 where it is stretched.
    share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    frequency = share * frequency + (1.0 - share) * frequency / factor
  angles = positions.astype(jnp.float32)[..., None] * frequency[None, None]
  return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the two halves of every head: x [B, T, heads, H]."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return turned.astype(x.dtype)


def packed_mask(
  segment_ids: jax.Array, *, sliding_window: int = 0
) -> jax.Array:
  """Returns bool[B, T, T]: causal, and within a segment only.

  Padding (segment 0) sees padding: no row of the mask is empty, so the softmax
  stays finite. What padding gives is never read.
  """
  length = segment_ids.shape[1]
  query = jnp.arange(length)[:, None]
  key = jnp.arange(length)[None, :]
  causal = key <= query
  if sliding_window:
    causal &= query - key < sliding_window
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return causal[None] & same


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """Grouped-query attention with a float32 softmax.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: [B, S, K, H].
    mask: bool[B, T, S], True where a query may look.
    scale: multiplies the scores.

  Returns:
    [B, T, N, H] in the dtype of `query`.
  """
  batch, length, heads, width = query.shape
  kv_heads = key.shape[2]
  group = heads // kv_heads
  # Batch dimensions lead, and the queries that share a key are rows of one
  # matrix: with them in the middle the CPU backend was up to five times slower.
  query = query.reshape(batch, length, kv_heads, group, width)
  rows = query.transpose(0, 2, 3, 1, 4).reshape(
    batch, kv_heads, group * length, width
  )
  key, value = (x.transpose(0, 2, 1, 3) for x in (key, value))
  scores = jnp.einsum(
    "bkrh,bksh->bkrs", rows, key, preferred_element_type=jnp.float32
  )
  scores = scores.reshape(batch, kv_heads, group, length, -1)
  scores = jnp.where(mask[:, None, None], scores * scale, -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  mixed = jnp.einsum(
    "bkrs,bksh->bkrh",
    weights.reshape(batch, kv_heads, group * length, -1),
    value,
  )
  mixed = mixed.reshape(batch, kv_heads, group, length, width)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def _products(query: jax.Array, keys: jax.Array) -> jax.Array:
  """Returns the products [P, K, C, S] of queries [P, K, C, H] and keys."""

  def queries_first(query: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.einsum(
      "pkch,pksh->pkcs", query, keys, preferred_element_type=jnp.float32
    )

  def keys_first(query: jax.Array, keys: jax.Array) -> jax.Array:
    scores = jnp.einsum(
      "pksh,pkch->pksc", keys, query, preferred_element_type=jnp.float32
    )
    # Else the compiler turns the product around again.
    return jnp.swapaxes(jax.lax.optimization_barrier(scores), 2, 3)

  # A CPU packs the second matrix of a product before it multiplies. Where it is
  # the keys, that costs more than the product itself for a few queries: 1.8 ms
  # for 0.7 (64 rows of 256 keys, 2 heads of 64, 2 queries a head).
  if query.shape[2] > _FEW_QUERIES:
    return queries_first(query, keys)
  return jax.lax.platform_dependent(
    query, keys, cpu=keys_first, default=queries_first
  )


def attend_levels(
  query: jax.Array,
  levels: Sequence[Cache],
  masks: Sequence[jax.Array],
  *,
  scale: float,
) -> jax.Array:
  """Attention of rows whose text lies in levels; each key is read once.

  R rows of queries look at levels of P texts each, where P divides R and the
  R / P rows that share a text stand side by side. All levels are under one
  softmax, so the result is what `attend` gives on the levels copied to each row
  and joined, without the copies: what bounds decoding is the bytes of keys that
  are read.

  Args:
    query: [R, T, N, H].
    levels: one layer of the cache of each level: keys and values [P, K, S, H],
      which if they are int8 have scales [P, K, S].
    masks: bool[R, T, S] of each level, True where a query may look. A row needs
      at least one such place.
    scale: multiplies the scores.

  Returns:
    [R, T, N, H] in the dtype of `query`.
  """
  rows, length, heads, width = query.shape
  kv_heads = levels[0].keys.shape[1]
  group = heads // kv_heads
  count = group * length
  # [R, K, G * T, H]: all queries of a row that share a key head are rows of one
  # matrix, as in `attend`. C stands for G * T below.
  query = query.reshape(rows, length, kv_heads, group, width)
  query = query.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, count, width)

  def beside(x: jax.Array, texts: int) -> jax.Array:
    """[R, K, C, X] -> [P, K, R / P * C, X]: one matrix for each text."""
    if texts == rows:
      return x
    x = x.reshape(texts, rows // texts, kv_heads, count, -1)
    return x.transpose(0, 2, 1, 3, 4).reshape(
      texts, kv_heads, rows // texts * count, -1
    )

  def apart(x: jax.Array, texts: int) -> jax.Array:
    """The inverse of `beside`: [P, K, R / P * C, X] -> [R, K, C, X]."""
    if texts == rows:
      return x
    x = x.reshape(texts, kv_heads, rows // texts, count, -1)
    return x.transpose(0, 2, 1, 3, 4).reshape(rows, kv_heads, count, -1)

  def scores_of(level: Cache, mask: jax.Array) -> jax.Array:
    texts = level.keys.shape[0]
    scores = _products(beside(query, texts), level.keys.astype(query.dtype))
    if level.key_scales is not None:
      # After the product there is one number to scale where a key has H.
      scores *= level.key_scales[:, :, None]
    scores = apart(scores, texts).reshape(rows, kv_heads, group, length, -1)
    scores = jnp.where(mask[:, None, None], scores * scale, -1e30)
    return scores.reshape(rows, kv_heads, count, -1)

  # The softmax goes over all levels without joining their scores: one maximum
  # and one sum for all.
  scores = [
    scores_of(level, mask) for level, mask in zip(levels, masks, strict=True)
  ]
  highest = functools.reduce(
    jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in scores]
  )
  weights = [jnp.exp(x - highest) for x in scores]
  total = functools.reduce(
    jnp.add, [jnp.sum(x, axis=-1, keepdims=True) for x in weights]
  )

  def mixed_of(weights: jax.Array, level: Cache) -> jax.Array:
    texts = level.values.shape[0]
    weights = beside(weights / total, texts)
    if level.value_scales is not None:
      weights *= level.value_scales[:, :, None]
    mixed = jnp.einsum(
      "pkrs,pksh->pkrh",
      weights.astype(query.dtype),
      level.values.astype(query.dtype),
    )
    return apart(mixed, texts)

  mixed = functools.reduce(
    jnp.add,
    [mixed_of(x, level) for x, level in zip(weights, levels, strict=True)],
  )
  mixed = mixed.reshape(rows, kv_heads, group, length, width)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)
