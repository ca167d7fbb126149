"""The output head in blocks of positions and vocabulary, with its gradient.

The logits of a batch, `[B, T, V]`, never exist at once. One pass over blocks of
them adds up a few sums a position, of which log-probability, KL and entropy
are made. The backward pass makes each block again, or takes the one that was
kept, turns it into the gradient of the logits, and adds that up into the
gradients of the hidden states and of the head. Besides these two, nothing that
either pass makes grows with V, unless the logits are kept.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax.losses.head_blocks import (
  LOWEST_LOGIT,
  Inputs,
  Logits,
  Plan,
  cut_columns,
  cut_rows,
  empty_logits,
  get_logits,
  loop_columns,
  loop_rows,
  make_logits,
  no_sum,
  product,
  put_logits,
  put_rows,
)


class RefSums(NamedTuple):
  """What a reference adds to `Sums`; y are its logits."""

  top: jax.Array  # max y
  mass: jax.Array  # sum exp(y - ref.top)
  target: jax.Array  # y of the token
  # Reverse: sum exp(x - top) (x - y). Forward: sum exp(y - ref.top) (y - x).
  ratio: jax.Array


class Sums(NamedTuple):
  """Sums over the vocabulary, f32[B, T] each; x are the logits.

  Exponentials are taken relative to the largest logit seen so far, `top`.
  """

  top: jax.Array  # max x
  mass: jax.Array  # sum exp(x - top)
  spread: jax.Array  # sum exp(x - top) (x - top)
  target: jax.Array  # x of the token
  ref: RefSums | None = None


def head_sums(inputs: Inputs, plan: Plan) -> tuple[Sums, Logits | None]:
  """Adds up what log-probability, KL and entropy are made of.

  Args:
    inputs: the arrays.
    plan: how to cut.

  Returns:
    (the sums over the whole vocabulary, the same on all devices of `plan.axes`;
    the logits of all blocks, None without `plan.keeps`)
  """
  zero = no_sum(inputs)
  lowest = zero + LOWEST_LOGIT
  sums = Sums(lowest, zero, zero, zero)
  if inputs.ref_head is not None:
    sums = sums._replace(ref=RefSums(lowest, zero, zero, zero))

  def columns_body(column: jax.Array, carry: Any) -> Any:
    block = cut_columns(inputs, column, plan)

    def body(row: jax.Array, carry: Any) -> Any:
      sums, kept = carry
      rows = functools.partial(cut_rows, index=row, plan=plan)
      logits = make_logits(inputs, block, row, plan)
      new = _block_sums(
        *logits, rows(block.tokens), block.mask, plan.forward_kl
      )
      new = _add(jax.tree.map(rows, sums), new, plan.forward_kl)
      kept = put_logits(kept, logits, block, row, inputs, plan)
      return put_rows(sums, new, row, plan), kept

    return loop_rows(inputs, plan, body, carry)

  sums, kept = loop_columns(
    inputs, plan, columns_body, (sums, empty_logits(inputs, plan))
  )
  if not plan.axes:
    return sums, kept
  highest = functools.partial(jax.lax.pmax, axis_name=plan.axes)
  top = highest(sums.top)
  ref_top = None if sums.ref is None else highest(sums.ref.top)
  sums = _relative_to(sums, top, ref_top, plan.forward_kl)
  total = functools.partial(jax.lax.psum, axis_name=plan.axes)
  return _with_tops(jax.tree.map(total, sums), top, ref_top), kept


def head_gradients(
  inputs: Inputs,
  sums: Sums,
  kept: Logits | None,
  logps_grad: jax.Array,
  kl_grad: jax.Array | None,
  plan: Plan,
  *,
  with_head: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the gradients of hidden states and head.

  With the probabilities p of the policy and q of the reference, the gradient
  of the logit of token v is

    logps_grad (1[v = token] - p_v) + kl_grad p_v (x_v - y_v - E_p[x - y])

  where for the forward KL the second term is kl_grad (p_v - q_v).

  Args:
    inputs: what `head_sums` was given.
    sums: what it returned.
    kept: the logits it returned; None makes them again.
    logps_grad: f32[B, T], of the log-probabilities.
    kl_grad: f32[B, T], of the KL; None where no KL is used.
    plan: how to cut.
    with_head: whether the head is trained.

  Returns:
    (as `inputs.hidden`, but f32; as `inputs.head`, or None). Where V is split,
    the first is only what this device's columns add to it.
  """
  hidden, head = inputs.hidden, inputs.head
  if kl_grad is None:
    inputs = inputs._replace(ref_hidden=None, ref_head=None)
  zero = no_sum(inputs)
  hidden_grad = jnp.broadcast_to(zero[..., None], hidden.shape)
  zero = zero[:1, :1]
  head_grad = None
  if with_head:
    head_grad = jnp.broadcast_to(zero.astype(head.dtype), head.shape)

  def columns_body(column: jax.Array, carry: Any) -> Any:
    hidden_grad, head_grad = carry
    block = cut_columns(inputs, column, plan)
    # The gradient of a block of the head is summed in float32 and rounded to
    # the dtype of the head once.
    block_grad = None
    if with_head:
      block_grad = jnp.broadcast_to(zero, block.head.shape)

    def body(row: jax.Array, carry: Any) -> Any:
      hidden_grad, block_grad = carry
      rows = functools.partial(cut_rows, index=row, plan=plan)
      logits_grad = _logits_grad(
        *get_logits(kept, block, row, inputs, plan),
        rows(block.tokens),
        block.mask,
        jax.tree.map(rows, sums),
        rows(logps_grad),
        None if kl_grad is None else rows(kl_grad),
        plan.forward_kl,
      )
      # The products run in the dtype of the activations, as those of every
      # layer do.
      logits_grad = (logits_grad * inputs.scale).astype(hidden.dtype)
      new = product("bcv,dv->bcd", logits_grad, block.head)
      hidden_grad = put_rows(hidden_grad, rows(hidden_grad) + new, row, plan)
      if block_grad is not None:
        block_grad = block_grad + product(
          "bcd,bcv->dv", rows(hidden), logits_grad
        )
      return hidden_grad, block_grad

    hidden_grad, block_grad = loop_rows(
      inputs, plan, body, (hidden_grad, block_grad)
    )
    if head_grad is not None and block_grad is not None:
      old = jax.lax.dynamic_slice_in_dim(
        head_grad, block.start, plan.columns, 1
      )
      # The last block overlaps the one before it, but adds zeros there.
      head_grad = jax.lax.dynamic_update_slice_in_dim(
        head_grad, old + block_grad.astype(head.dtype), block.start, 1
      )
    return hidden_grad, head_grad

  return loop_columns(inputs, plan, columns_body, (hidden_grad, head_grad))


def _block_sums(
  logits: jax.Array,
  ref_logits: jax.Array | None,
  tokens: jax.Array,
  mask: jax.Array | None,
  forward_kl: bool,
) -> Sums:
  """The sums of one block, [B, C, W] -> [B, C].

  Args:
    logits: f32[B, C, W].
    ref_logits: the same, or None.
    tokens: i32[B, C], relative to the first column of the block.
    mask: bool[1, 1, W], the columns to count; None: all.
    forward_kl: which KL.
  """

  def total(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-1)

  def largest(x: jax.Array) -> jax.Array:
    if mask is not None:
      x = jnp.where(mask, x, LOWEST_LOGIT)
    return jnp.max(x, axis=-1)

  def exp(x: jax.Array) -> jax.Array:
    x = jnp.exp(x)
    return x if mask is None else jnp.where(mask, x, 0.0)

  chosen = _is_token(tokens, logits, mask)
  top = largest(logits)
  above = logits - top[..., None]
  weights = exp(above)
  sums = Sums(
    top,
    total(weights),
    total(weights * above),
    total(jnp.where(chosen, logits, 0.0)),
  )
  if ref_logits is None:
    return sums
  ref_top = largest(ref_logits)
  ref_weights = exp(ref_logits - ref_top[..., None])
  if forward_kl:
    ratio = total(ref_weights * (ref_logits - logits))
  else:
    ratio = total(weights * (logits - ref_logits))
  ref_target = total(jnp.where(chosen, ref_logits, 0.0))
  return sums._replace(
    ref=RefSums(ref_top, total(ref_weights), ref_target, ratio)
  )


def _relative_to(
  sums: Sums, top: jax.Array, ref_top: jax.Array | None, forward_kl: bool
) -> Sums:
  """The same sums with exponentials relative to other, higher tops."""
  shift = sums.top - top
  factor = jnp.exp(shift)
  ref = sums.ref
  if ref is not None and ref_top is not None:
    ref_factor = jnp.exp(ref.top - ref_top)
    ref = RefSums(
      ref_top,
      ref_factor * ref.mass,
      ref.target,
      (ref_factor if forward_kl else factor) * ref.ratio,
    )
  return Sums(
    top,
    factor * sums.mass,
    factor * (sums.spread + shift * sums.mass),
    sums.target,
    ref,
  )


def _add(first: Sums, second: Sums, forward_kl: bool) -> Sums:
  """The sums over two sets of columns."""
  top = jnp.maximum(first.top, second.top)
  ref_top = None
  if first.ref is not None and second.ref is not None:
    ref_top = jnp.maximum(first.ref.top, second.ref.top)
  first = _relative_to(first, top, ref_top, forward_kl)
  second = _relative_to(second, top, ref_top, forward_kl)
  return _with_tops(jax.tree.map(jnp.add, first, second), top, ref_top)


def _with_tops(sums: Sums, top: jax.Array, ref_top: jax.Array | None) -> Sums:
  """Puts right the two that are not sums."""
  ref = sums.ref
  if ref is not None and ref_top is not None:
    ref = ref._replace(top=ref_top)
  return sums._replace(top=top, ref=ref)


def _logits_grad(
  logits: jax.Array,
  ref_logits: jax.Array | None,
  tokens: jax.Array,
  mask: jax.Array | None,
  sums: Sums,
  logps_grad: jax.Array,
  kl_grad: jax.Array | None,
  forward_kl: bool,
) -> jax.Array:
  """The gradient of the logits of a block, f32[B, C, W]."""

  def wide(x: jax.Array) -> jax.Array:
    return x[..., None]

  probs = jnp.exp(logits - wide(sums.top + jnp.log(sums.mass)))
  ref = sums.ref
  if kl_grad is None or ref is None or ref_logits is None:
    grad = -probs * wide(logps_grad)
  elif forward_kl:
    ref_probs = jnp.exp(ref_logits - wide(ref.top + jnp.log(ref.mass)))
    grad = probs * wide(kl_grad - logps_grad) - ref_probs * wide(kl_grad)
  else:
    log_ratio = logits - ref_logits - wide(ref.ratio / sums.mass)
    grad = probs * (wide(kl_grad) * log_ratio - wide(logps_grad))
  chosen = _is_token(tokens, logits, mask)
  grad = grad + jnp.where(chosen, wide(logps_grad), 0.0)
  # A logit that was raised to the lowest one does not depend on anything.
  counts = logits > LOWEST_LOGIT
  return jnp.where(counts if mask is None else counts & mask, grad, 0.0)


def _is_token(
  tokens: jax.Array, logits: jax.Array, mask: jax.Array | None
) -> jax.Array:
  # Comparing takes the place of a gather: its gradient needs no scatter, and
  # each device looks through the columns of a split vocabulary that it holds.
  index = jnp.arange(logits.shape[-1], dtype=tokens.dtype)
  chosen = tokens[..., None] == index[None, None, :]
  return chosen if mask is None else chosen & mask
