"""Sums and means over the sequences of packed rows.

A row `[T]` holds one sequence or several, back to back. `segment_ids` says
which: 0 is padding, k > 0 the k-th sequence of the row; `None` means one
sequence a row. Every function here keeps the shape `[B, T]`, works in float32
and mixes nothing across rows, so that a batch sharded over B stays so.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Count(NamedTuple):
  """How much a mask selects; additive over micro-batches and devices.

  A loss divides by a count. Give it the count of the *whole* batch, and the
  losses (and gradients, and metrics) of the micro-batches add up to those of
  the whole batch, however its sequences are spread over them.
  """

  sequences: jax.Array  # f32[], sequences with at least one selected token
  tokens: jax.Array  # f32[], selected tokens


def check_shapes(**arrays: jax.Array | None) -> None:
  """Raises a ValueError unless all arrays (None is skipped) are one [B, T]."""
  shapes = {k: jnp.shape(v) for k, v in arrays.items() if v is not None}
  if len(set(shapes.values())) > 1 or any(len(s) != 2 for s in shapes.values()):
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(
      f"expected arrays of one shape [B, T], got {listed}; a single sequence "
      "needs a leading axis of 1"
    )


def last_of_segment(
  shape: tuple[int, ...], segment_ids: jax.Array | None = None
) -> jax.Array:
  """Marks the last position of every sequence (and run of padding).

  Args:
    shape: (B, T).
    segment_ids: i32[B, T] or None.

  Returns:
    bool[B, T].
  """
  last_column = jnp.arange(shape[1]) == shape[1] - 1
  last_column = jnp.broadcast_to(last_column[None, :], shape)
  if segment_ids is None:
    return last_column
  changes = segment_ids != jnp.roll(segment_ids, -1, axis=1)
  return changes | last_column


def linear_recurrence(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Solves `y[t] = x[t] + scale[t] * y[t + 1]`, with y 0 after the end.

  Spans of 1, 2, 4, ... positions are joined pairwise, in log2(T) passes over
  the whole array. (`jax.lax.associative_scan` does half the arithmetic, but
  unrolls into a graph that takes ten times as long to compile.)

  Args:
    x: f32[..., T].
    scale: f32[..., T].

  Returns:
    f32[..., T].

  Example:
    >>> import jax.numpy as jnp
    >>> linear_recurrence(jnp.ones(3), jnp.asarray([0.5, 0.0, 0.5])).tolist()
    [1.5, 1.0, 1.0]
  """
  length = x.shape[-1]
  x, scale = x.astype(jnp.float32), scale.astype(jnp.float32)

  def double(
    carry: tuple[jax.Array, jax.Array], span: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    def shift_left(z: jax.Array) -> jax.Array:
      z = jnp.concatenate([z, jnp.zeros_like(z)], axis=-1)
      return jax.lax.dynamic_slice_in_dim(z, span, length, axis=-1)

    # The pair stands for y[t] = partial[t] + factor[t] * y[t + span]: `partial`
    # has added up the next `span` positions, `factor` is the product of their
    # scales. Put that equation for t + span into the one for t, and the same
    # holds with twice the span.
    partial, factor = carry
    partial = partial + factor * shift_left(partial)
    return (partial, factor * shift_left(factor)), None

  # Once the span reaches past the end, y[t + span] is 0 and y is `partial`.
  spans = 2 ** jnp.arange((length - 1).bit_length())
  (y, _), _ = jax.lax.scan(double, (x, scale), spans)
  return y


def sums_until(x: jax.Array, ends: jax.Array) -> jax.Array:
  """Sums from each position up to and including the next marked one.

  Args:
    x: [..., T].
    ends: bool[..., T], the positions at which a sum ends.

  Returns:
    f32[..., T].
  """
  return linear_recurrence(x, 1.0 - ends.astype(jnp.float32))


def suffix_sums(
  x: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Sums from each position to the end of its sequence.

  Args:
    x: [B, T].
    segment_ids: i32[B, T] or None.

  Returns:
    f32[B, T].

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    >>> suffix_sums(x, jnp.asarray([[1, 1, 2, 2]])).tolist()
    [[3.0, 2.0, 7.0, 4.0]]
  """
  return sums_until(x, last_of_segment(x.shape, segment_ids))


def _sums_both_ways(
  x: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Sums from the sequence's start to t, and from t to its end, in one pass.

  Args:
    x: [..., B, T].
    segment_ids: i32[B, T] or None.

  Returns:
    Two f32[..., B, T]; both hold the entry at t itself.
  """
  lasts = last_of_segment(x.shape[-2:], segment_ids)
  # A sum from the start is a sum to the end of the mirrored row. There a
  # sequence ends at its first position, which is the one after the last of
  # the sequence before; `roll` also marks position 0, after the row's last.
  firsts = jnp.roll(lasts, 1, axis=-1)
  ends = jnp.stack([jnp.flip(firsts, axis=-1), lasts])
  # The leading axes of x, for stacked masks, share the ends of the rows.
  leading = (1,) * (x.ndim - 2)
  ends = ends.reshape(2, *leading, *lasts.shape)
  mirrored, suffix = sums_until(
    jnp.stack([jnp.flip(x, axis=-1), x]),
    jnp.broadcast_to(ends, (2, *x.shape)),
  )
  return jnp.flip(mirrored, axis=-1), suffix


def segment_totals(
  x: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Writes at each position the sum of `x` over the position's sequence.

  Args:
    x: [B, T].
    segment_ids: i32[B, T] or None.

  Returns:
    f32[B, T], constant over a sequence, up to rounding.
  """
  prefix, suffix = _sums_both_ways(x, segment_ids)
  # Both sums hold the entry at the position itself.
  return prefix + suffix - x.astype(jnp.float32)


class Selection(NamedTuple):
  """A mask with what the means over it need."""

  mask: jax.Array  # bool[..., B, T]
  first: jax.Array  # bool, the first selected position of every sequence
  own: jax.Array  # f32, selected positions of the position's sequence

  def count(self) -> Count:
    """Counts what the mask selects of these rows."""
    return Count(
      sequences=self.first.sum(axis=(-2, -1), dtype=jnp.float32),
      tokens=self.mask.sum(axis=(-2, -1), dtype=jnp.float32),
    )


def select(mask: jax.Array, segment_ids: jax.Array | None = None) -> Selection:
  """Finds how a mask falls on the sequences of the rows.

  Args:
    mask: bool[..., B, T]; several masks of the same rows may be stacked.
    segment_ids: i32[B, T] or None.

  Returns:
    A `Selection`.
  """
  mask = mask.astype(bool)
  prefix, suffix = _sums_both_ways(mask, segment_ids)
  return Selection(
    mask=mask,
    # Sums of ones are exact in float32, so that they may be compared.
    first=mask & (prefix == 1.0),
    own=prefix + suffix - mask.astype(jnp.float32),
  )


def count_mask(mask: jax.Array, segment_ids: jax.Array | None = None) -> Count:
  """Counts the selected tokens and the sequences that have any.

  Args:
    mask: bool[B, T].
    segment_ids: i32[B, T] or None.

  Returns:
    A `Count`; counts of the parts of a batch add up (`jax.tree.map`).

  Example:
    >>> import jax.numpy as jnp
    >>> mask = jnp.asarray([[True, True, False, False]])
    >>> count = count_mask(mask, jnp.asarray([[1, 1, 2, 2]]))
    >>> float(count.sequences), float(count.tokens)
    (1.0, 2.0)
  """
  return select(mask, segment_ids).count()


def mean_weights(
  selection: Selection, count: Count, *, reduction: str
) -> jax.Array:
  """Weights `w` that make `weighted_sum(w, x)` the mean of `x` over a mask.

  Args:
    selection: of a mask [B, T].
    count: what the mask selects in the whole batch.
    reduction: "sequence" is the mean over the selected tokens of a sequence,
      then over the sequences that have any; "token" the mean over all selected
      tokens.

  Returns:
    f32[B, T], 0 outside the mask; all 0 for an empty mask.

  Raises:
    ValueError: for any other reduction.
  """
  if reduction == "token":
    divisor = jnp.maximum(count.tokens, 1.0)
  elif reduction == "sequence":
    divisor = selection.own * jnp.maximum(count.sequences, 1.0)
  else:
    raise ValueError(
      f'reduction must be "sequence" or "token", got {reduction!r}'
    )
  mask = selection.mask
  # The inner `where` keeps 1 / 0 out of the branch that is not taken, whose
  # gradient would be NaN.
  return jnp.where(mask, 1.0 / jnp.where(mask, divisor, 1.0), 0.0)


def weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
  """Sums `weights * x` and ignores `x`, NaN or not, where the weight is 0.

  Args:
    weights: f32[B, T], as `mean_weights` gives them.
    x: [B, T].

  Returns:
    f32[].
  """
  return jnp.sum(weights * jnp.where(weights > 0.0, x.astype(jnp.float32), 0.0))
