"""How the output head is cut into blocks of positions and vocabulary.

A block of logits is `[B, C, W]`: C positions of every row, W columns of the
head. What is computed of a block is in `head.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

# Finite stand-in for a logit of minus infinity: its probability is 0 in
# float32, yet differences, products and squares of it stay finite.
LOWEST_LOGIT = -1e9

Carry = TypeVar("Carry")


class Plan(NamedTuple):
  """How the logits are cut, and what is made of them; static under jit."""

  positions: int  # C; T is a multiple of it
  columns: int  # W, at most V
  forward_kl: bool  # KL(ref || pi) instead of KL(pi || ref)
  axes: tuple[str, ...]  # mesh axes that V is split over, inside a shard_map
  keeps: bool  # whether the logits wait for the backward pass


class Inputs(NamedTuple):
  """The arrays of a head; see `logprobs.token_logprobs`."""

  hidden: jax.Array  # [B, T, D]
  head: jax.Array  # [D, V], of this device where V is split
  tokens: jax.Array  # i32[B, T]
  scale: jax.Array  # f32[]
  ref_hidden: jax.Array | None = None  # [B, T, D']
  ref_head: jax.Array | None = None  # [D', V]
  # i32[], how many blocks of positions are computed, from the first; None: all.
  used: jax.Array | None = None


class Logits(NamedTuple):
  """Logits, f32[B, C, W] of a block, or f32[blocks, B, C, W] of all."""

  policy: jax.Array
  ref: jax.Array | None


class Block(NamedTuple):
  """The columns of a block, and where it lies."""

  head: jax.Array  # [D, W]
  ref_head: jax.Array | None  # [D', W]
  tokens: jax.Array  # i32[B, T], counted from the block's first column
  mask: jax.Array | None  # bool[1, 1, W], columns no block before has had
  start: jax.Array  # i32[], its first column
  number: jax.Array  # i32[], which of the blocks of columns this is


def column_blocks(inputs: Inputs, plan: Plan) -> int:
  """Returns into how many blocks the columns are cut."""
  return -(-inputs.head.shape[1] // plan.columns)


def cut_columns(inputs: Inputs, index: jax.Array, plan: Plan) -> Block:
  """Cuts a block of columns out of the heads."""
  vocab = inputs.head.shape[1]
  tokens = inputs.tokens
  if plan.axes:
    tokens = tokens - jax.lax.axis_index(plan.axes) * vocab
  # The last block overlaps the one before it where W does not divide V.
  fresh = index * plan.columns
  start = jnp.minimum(fresh, vocab - plan.columns)

  def cut(head: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(head, start, plan.columns, axis=1)

  ref_head = None if inputs.ref_head is None else cut(inputs.ref_head)
  mask = None
  if vocab % plan.columns:
    column = start + jnp.arange(plan.columns, dtype=jnp.int32)
    mask = (column >= fresh)[None, None, :]
  return Block(cut(inputs.head), ref_head, tokens - start, mask, start, index)


def cut_rows(x: jax.Array, index: jax.Array, plan: Plan) -> jax.Array:
  """Cuts a block of positions out of [B, T, ...]."""
  return jax.lax.dynamic_slice_in_dim(
    x, index * plan.positions, plan.positions, axis=1
  )


def put_rows(old: Carry, new: Carry, index: jax.Array, plan: Plan) -> Carry:
  """Writes a block of positions into every array [B, T, ...] of a tree."""
  return jax.tree.map(
    lambda x, y: jax.lax.dynamic_update_slice_in_dim(
      x, y, index * plan.positions, axis=1
    ),
    old,
    new,
  )


def make_logits(
  inputs: Inputs, block: Block, row: jax.Array, plan: Plan
) -> Logits:
  """Returns the logits of a block, those of the reference with them."""
  rows = functools.partial(cut_rows, index=row, plan=plan)

  def logits_of(hidden: jax.Array, head: jax.Array) -> jax.Array:
    # float32 from here on: a bfloat16 log-softmax loses the differences
    # between policy and reference that all our losses are made of.
    logits = product("bcd,dv->bcv", rows(hidden), head)
    return jnp.maximum(logits * inputs.scale, LOWEST_LOGIT)

  ref_logits = None
  if inputs.ref_hidden is not None and block.ref_head is not None:
    ref_logits = logits_of(inputs.ref_hidden, block.ref_head)
  return Logits(logits_of(inputs.hidden, block.head), ref_logits)


def empty_logits(inputs: Inputs, plan: Plan) -> Logits | None:
  """Returns room for the logits of all blocks; None where none are kept."""
  if not plan.keeps:
    return None
  rows, length = inputs.tokens.shape
  blocks = length // plan.positions * column_blocks(inputs, plan)
  shape = (blocks, rows, plan.positions, plan.columns)
  zeros = jnp.broadcast_to(no_sum(inputs)[:1, :1], shape)
  return Logits(zeros, None if inputs.ref_head is None else zeros)


def put_logits(
  kept: Logits | None,
  new: Logits,
  block: Block,
  row: jax.Array,
  inputs: Inputs,
  plan: Plan,
) -> Logits | None:
  """Writes the logits of a block into the room for all."""
  if kept is None:
    return None
  index = row * column_blocks(inputs, plan) + block.number
  return jax.tree.map(
    lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0), kept, new
  )


def get_logits(
  kept: Logits | None,
  block: Block,
  row: jax.Array,
  inputs: Inputs,
  plan: Plan,
) -> Logits:
  """Returns the logits of a block: those that were kept, or new ones."""
  if kept is None:
    return make_logits(inputs, block, row, plan)
  index = row * column_blocks(inputs, plan) + block.number
  if inputs.ref_head is None:
    kept = kept._replace(ref=None)
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), kept
  )


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns a product of matrices in the dtype of `x`, summed in float32."""
  multiply = functools.partial(
    jnp.einsum, equation, preferred_element_type=jnp.float32
  )
  y = y.astype(x.dtype)
  if x.dtype == jnp.float32:
    return multiply(x, y)

  def widened(x: jax.Array, y: jax.Array) -> jax.Array:
    return multiply(x.astype(jnp.float32), y.astype(jnp.float32))

  # XLA's CPU backend has no kernel for some products of bfloat16 that are
  # summed in float32 ("Unsupported element type for DotThunk"). Each product of
  # two such numbers is exact in float32, so nothing but the order changes.
  return jax.lax.platform_dependent(x, y, cpu=widened, default=multiply)


def loop_columns(
  inputs: Inputs,
  plan: Plan,
  body: Callable[[jax.Array, Carry], Carry],
  carry: Carry,
) -> Carry:
  """Calls carry = body(index, carry) for every block of columns."""
  return _loop(column_blocks(inputs, plan), None, body, carry)


def loop_rows(
  inputs: Inputs,
  plan: Plan,
  body: Callable[[jax.Array, Carry], Carry],
  carry: Carry,
) -> Carry:
  """Calls carry = body(index, carry) for the blocks of positions in use."""
  count = inputs.tokens.shape[1] // plan.positions
  return _loop(count, inputs.used, body, carry)


def _loop(
  count: int,
  used: jax.Array | None,
  body: Callable[[jax.Array, Carry], Carry],
  carry: Carry,
) -> Carry:
  if count == 1:
    # Without a loop the compiler sees that the slices are the whole arrays.
    return body(jnp.int32(0), carry)
  if used is not None:
    return jax.lax.fori_loop(jnp.int32(0), used, body, carry)
  carry, _ = jax.lax.scan(
    lambda carry, index: (body(index, carry), None),
    carry,
    jnp.arange(count, dtype=jnp.int32),
  )
  return carry


def no_sum(inputs: Inputs) -> jax.Array:
  """Returns zeros, f32[B, T], to start a sum from.

  Made of an argument, as inside a `shard_map` a loop has to start from what
  differs between the devices like what it adds.
  """
  return (inputs.tokens * 0).astype(jnp.float32)
