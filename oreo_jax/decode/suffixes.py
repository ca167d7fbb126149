"""What the beams of a question have generated: chosen, copied, continued.

Rows of one question are side by side and never meet those of another, so that
every choice is counted within its question. Devices that hold different
questions then have nothing to exchange.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def pick(x: jax.Array, index: jax.Array, *, axis: int = 0) -> jax.Array:
  """Returns some rows of every question.

  Args:
    x: [..., Q * n, ...], n rows a question.
    index: i32[Q, N], of rows 0 to n - 1 of each question.
    axis: the dimension of the rows.

  Returns:
    [..., Q * N, ...].
  """
  questions = index.shape[0]
  x = x.reshape(*x.shape[:axis], questions, -1, *x.shape[axis + 1 :])
  take = jax.vmap(
    lambda rows, index: jnp.take(rows, index, axis=axis, mode="clip"),
    in_axes=(axis, 0),
    out_axes=axis,
  )
  taken = take(x, index)
  return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def pick_rows(rows: Tree, index: jax.Array) -> Tree:
  """Does `pick` on every array of a tree, whose rows come first."""
  return jax.tree.map(lambda x: pick(x, index), rows)


def where_rows(condition: jax.Array, new: Tree, old: Tree) -> Tree:
  """Does `jnp.where` row by row, on every array of two trees.

  Args:
    condition: bool[R].
    new: arrays [R, ...], whose rows are taken where the condition holds.
    old: the same for the other rows.
  """
  return jax.tree.map(
    lambda x, y: jnp.where(condition.reshape(-1, *(1,) * (x.ndim - 1)), x, y),
    new,
    old,
  )


def append(
  old: jax.Array, new: jax.Array, start: jax.Array, *, axis: int = 1
) -> jax.Array:
  """Writes new text behind old text, each row at its own place.

  Args:
    old: [..., R, ..., A, ...].
    new: the same with M <= A slots in place of A. Those that do not fit are
      left out.
    start: i32[R], the first slot of each row that is written; M are, of which
      the caller knows how many mean something.
    axis: the dimension of the slots. That of the rows is 0 if it is 1, else 1.

  Returns:
    The shape of `old`.
  """
  rows_axis = 0 if axis == 1 else 1
  axis -= 1  # of one row
  room, count = old.shape[axis + 1], new.shape[axis + 1]

  def append_row(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    # A slice cannot be written beyond the end of a row. Near the end one is
    # written that begins earlier, with old slots before the new ones.
    begin = jnp.minimum(start, room - count)
    shift = start - begin
    new = jax.lax.dynamic_slice_in_dim(
      jnp.concatenate([new, new], axis), count - shift, count, axis
    )
    window = jax.lax.dynamic_slice_in_dim(old, begin, count, axis)
    shape = [1] * old.ndim
    shape[axis] = count
    is_old = (jnp.arange(count) < shift).reshape(shape)
    return jax.lax.dynamic_update_slice_in_dim(
      old, jnp.where(is_old, window, new.astype(old.dtype)), begin, axis
    )

  return jax.vmap(
    append_row, in_axes=(rows_axis, rows_axis, 0), out_axes=rows_axis
  )(old, new, start)
