"""Attention over blocks of keys, which never makes a [T, T] array.

The softmax of a row of scores can be built up block by block (online softmax,
Milakov and Gimelshein 2018, arXiv 1805.02867; FlashAttention, Dao et al. 2022,
arXiv 2205.14135): with m the largest score so far and

    l = sum_s exp(score_s - m),     a = sum_s exp(score_s - m) value_s,

a further block rescales l and a by exp(m_old - m_new) and adds its own sums.
The result is a / l. The backward pass recomputes the weights of a block from
the scores and from log l + m, the only thing it keeps of a row besides the
result. Memory grows with T times the size of a block.

Shapes: B batch, T time, N query heads, K key/value heads, H head width,
G = N/K queries that share a key, C tokens of a block, n blocks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from oreo_jax.models.attention import MIXED

# A score that no query sees. It is finite, so that the difference of two of
# them is 0 and not NaN.
_HIDDEN = -1e30


class _Blocks(NamedTuple):
  """A batch cut into n blocks of C tokens.

  The queries that share a key are rows of one matrix, as in
  `attention.attend`.
  """

  queries: jax.Array  # [n, B, K, G * C, H]
  keys: jax.Array  # [n, B, K, C, H]
  values: jax.Array  # [n, B, K, C, H]
  segments: jax.Array  # i32[n, B, C]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend_blockwise(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array,
  scale: float,
  sliding_window: int,
  block: int,
) -> jax.Array:
  """Causal grouped-query attention within segments, block by block.

  Args:
    query: [B, T, N, H].
    key: [B, T, K, H].
    value: [B, T, K, H].
    segment_ids: i32[B, T]; a token sees tokens of its own number only.
    scale: multiplies the scores.
    sliding_window: how many tokens back a query sees, itself included; 0: all.
    block: C, tokens of a block. T need not be a multiple of it.

  Returns:
    [B, T, N, H] in the dtype of `query`; what `attention.attend` gives with the
    mask of `attention.packed_mask`.
  """
  mixed, _ = _forward(
    query, key, value, segment_ids, scale, sliding_window, block
  )
  return mixed


def _forward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array,
  scale: float,
  sliding_window: int,
  block: int,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Returns what `attend_blockwise` does, and what its backward pass needs."""
  blocks = _cut(query, key, value, segment_ids, block)
  first, _ = _range_of(blocks.segments, sliding_window)

  def attend_from(index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attends from one block of queries to all it sees."""
    queries = blocks.queries[index]

    def add(
      other: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      largest, total, mixed = sums
      scores = _scores(blocks, index, other, scale, sliding_window)
      # A row that sees nothing of this block has only hidden scores. As long as
      # that was so for all blocks, it adds exp(0) for each of them; the first
      # real score then rescales these by exp(_HIDDEN - score) = 0. Every query
      # sees itself, so that one comes.
      new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
      shrink = jnp.exp(largest - new_largest)
      weights = jnp.exp(scores - new_largest[..., None])
      mixed = mixed * shrink[..., None] + jnp.einsum(
        "bkrs,bksh->bkrh",
        weights.astype(value.dtype),
        blocks.values[other],
        preferred_element_type=jnp.float32,
      )
      total = total * shrink + jnp.sum(weights, axis=-1)
      return new_largest, total, mixed

    row = jnp.zeros(queries.shape[:-1], jnp.float32)
    largest, total, mixed = jax.lax.fori_loop(
      first[index],
      index + 1,
      add,
      (row + _HIDDEN, row, jnp.zeros(queries.shape, jnp.float32)),
    )
    mixed = (mixed / total[..., None]).astype(query.dtype)
    return mixed, largest + jnp.log(total)

  indices = jnp.arange(blocks.segments.shape[0], dtype=jnp.int32)
  mixed, log_total = jax.lax.map(attend_from, indices)
  mixed, log_total = (
    checkpoint_name(x, MIXED) for x in (_join(mixed, query.shape), log_total)
  )
  return mixed, (query, key, value, segment_ids, mixed, log_total)


def _backward(
  scale: float,
  sliding_window: int,
  block: int,
  residuals: tuple[jax.Array, ...],
  grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """Returns the gradients of query, key and value.

  With p the weights and o the result of a row, and g the gradient of o:

      dv_s = sum_t p_ts g_t           ds_ts = p_ts (g_t . v_s - g_t . o_t)
      dq_t = scale sum_s ds_ts k_s    dk_s  = scale sum_t ds_ts q_t
  """
  query, key, value, segment_ids, mixed, log_total = residuals
  blocks = _cut(query, key, value, segment_ids, block)
  _, last = _range_of(blocks.segments, sliding_window)
  heads = key.shape[2]
  grads = _cut_rows(grad, heads, block)
  # g_t . o_t of every row, [n, B, K, G * C].
  shared = jnp.sum(
    grads.astype(jnp.float32)
    * _cut_rows(mixed, heads, block).astype(jnp.float32),
    axis=-1,
  )

  def gather_to(
    query_grads: jax.Array, index: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Collects one block of keys from all queries that see it."""
    keys, values = blocks.keys[index], blocks.values[index]

    def add(
      other: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      query_grads, key_grad, value_grad = sums
      scores = _scores(blocks, other, index, scale, sliding_window)
      weights = jnp.exp(scores - log_total[other][..., None])
      value_grad += jnp.einsum(
        "bkrs,bkrh->bksh",
        weights.astype(value.dtype),
        grads[other],
        preferred_element_type=jnp.float32,
      )
      weight_grad = jnp.einsum(
        "bkrh,bksh->bkrs",
        grads[other],
        values,
        preferred_element_type=jnp.float32,
      )
      score_grad = weights * (weight_grad - shared[other][..., None]) * scale
      score_grad = score_grad.astype(query.dtype)
      query_grads = query_grads.at[other].add(
        jnp.einsum(
          "bkrs,bksh->bkrh",
          score_grad,
          keys,
          preferred_element_type=jnp.float32,
        )
      )
      key_grad += jnp.einsum(
        "bkrs,bkrh->bksh",
        score_grad,
        blocks.queries[other],
        preferred_element_type=jnp.float32,
      )
      return query_grads, key_grad, value_grad

    zero = jnp.zeros(keys.shape, jnp.float32)
    query_grads, key_grad, value_grad = jax.lax.fori_loop(
      index, last[index] + 1, add, (query_grads, zero, zero)
    )
    return query_grads, (key_grad, value_grad)

  query_grads, (key_grads, value_grads) = jax.lax.scan(
    gather_to,
    jnp.zeros(blocks.queries.shape, jnp.float32),
    jnp.arange(blocks.segments.shape[0], dtype=jnp.int32),
  )
  return (
    _join(query_grads, query.shape).astype(query.dtype),
    _join(key_grads, key.shape).astype(key.dtype),
    _join(value_grads, value.shape).astype(value.dtype),
    None,
  )


attend_blockwise.defvjp(_forward, _backward)


def _scores(
  blocks: _Blocks,
  query_block: jax.Array,
  key_block: jax.Array,
  scale: float,
  sliding_window: int,
) -> jax.Array:
  """Returns the scores f32[B, K, G * C, C] of one block of each."""
  scores = jnp.einsum(
    "bkrh,bksh->bkrs",
    blocks.queries[query_block],
    blocks.keys[key_block],
    preferred_element_type=jnp.float32,
  )
  batch, heads, rows, size = scores.shape
  inside = jnp.arange(size, dtype=jnp.int32)
  distance = (query_block - key_block) * size + inside[:, None] - inside[None]
  seen = distance >= 0
  if sliding_window:
    seen &= distance < sliding_window
  same = (
    blocks.segments[query_block][:, :, None]
    == blocks.segments[key_block][:, None, :]
  )
  mask = (seen[None] & same)[:, None, None]
  scores = scores.reshape(batch, heads, rows // size, size, size)
  scores = jnp.where(mask, scores * scale, _HIDDEN)
  return scores.reshape(batch, heads, rows, size)


def _range_of(
  segments: jax.Array, sliding_window: int
) -> tuple[jax.Array, jax.Array]:
  """Returns which blocks can see each other.

  Two blocks whose ranges of segment ids do not overlap, in any row of the
  batch, have nothing to say to each other; most blocks of a long packed row do
  not. That the ranges overlap proves nothing, so the masks still decide.

  Returns:
    first: i32[n], of each block of queries the first block of keys it sees.
    last: i32[n], of each block of keys the last block of queries that sees it.
  """
  count, _, size = segments.shape
  low, high = jnp.min(segments, axis=-1), jnp.max(segments, axis=-1)
  # [n queries, n keys].
  sees = jnp.any(
    (low[:, None] <= high[None]) & (low[None] <= high[:, None]), axis=-1
  )
  index = jnp.arange(count, dtype=jnp.int32)
  distance = index[:, None] - index[None]
  sees &= distance >= 0
  if sliding_window:
    # The nearest tokens of two blocks are (distance - 1) * size + 1 apart.
    sees &= (distance - 1) * size + 1 < sliding_window
  # A block always sees itself, so that there is a True in every row and column.
  first = jnp.argmax(sees, axis=1).astype(jnp.int32)
  last = count - 1 - jnp.argmax(sees[::-1], axis=0).astype(jnp.int32)
  return first, last


def _cut(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array,
  block: int,
) -> _Blocks:
  batch, length = segment_ids.shape
  # Further padding at the end, which sees itself and earlier padding.
  segments = jnp.pad(segment_ids, ((0, 0), (0, -length % block)))
  segments = segments.reshape(batch, -1, block).transpose(1, 0, 2)
  query, key, value = (
    _cut_rows(x, key.shape[2], block) for x in (query, key, value)
  )
  return _Blocks(query, key, value, segments)


def _cut_rows(x: jax.Array, kv_heads: int, block: int) -> jax.Array:
  """[B, T, heads, H] -> [n, B, K, (heads / K) * C, H], padded to n blocks."""
  batch, length, heads, width = x.shape
  group = heads // kv_heads
  x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
  x = x.reshape(batch, -1, block, kv_heads, group, width)
  x = x.transpose(1, 0, 3, 4, 2, 5)
  return x.reshape(-1, batch, kv_heads, group * block, width)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of `_cut_rows`, for a result of this shape."""
  batch, length, heads, width = shape
  count, _, kv_heads, rows, _ = x.shape
  group = heads // kv_heads
  block = rows // group
  x = x.reshape(count, batch, kv_heads, group, block, width)
  x = x.transpose(1, 0, 4, 2, 3, 5)
  return x.reshape(batch, count * block, heads, width)[:, :length]
