"""The output head on a mesh: what crosses it, and how often.

Weights are split over `fsdp` along D and over `tensor` along V; rows are split
over `fsdp` too, so one of the two has to move. Left to itself, the partitioner
gathers the head for every block of logits. Here either the head or the hidden
states are gathered, whichever is smaller, once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from oreo_jax import losses
from oreo_jax.losses.logprobs import blocks_of_positions
from oreo_jax.sharding import batch_axes, batch_shards, free_axes


def token_logprobs(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  *,
  mask: jax.Array | None = None,
  ref_hidden: jax.Array | None = None,
  ref_head: jax.Array | None = None,
  chunk_size: int,
  **options: Any,
) -> losses.TokenLogprobs:
  """`losses.token_logprobs` on the mesh in force.

  The vocabulary is split over `tensor`. Beyond that there are two ways:

  - The head is gathered over `fsdp`, and its gradient summed and scattered;
    both happen once, in the dtype of the hidden states.
  - The vocabulary is split over `fsdp` as well, and the hidden states of all
    rows are gathered over it. Each device holds the columns it has to itself,
    so their gradient crosses nothing but the data axes.

  Rows that do not divide over the mesh are left to the partitioner.

  Args:
    hidden: [B, T, D], rows split over the batch axes.
    head: [D, V], split as `sharding.RULES` say.
    tokens: i32[B, T].
    mask: bool[B, T], the positions that are asked for, or None for all.
    ref_hidden: [B, T, D'] of the reference, or None.
    ref_head: [D', V], or None.
    chunk_size: positions of a block of logits of this device's rows.
    **options: what else `losses.token_logprobs` takes.

  Returns:
    A `TokenLogprobs` of f32[B, T], split like the rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not _is_split(mesh, len(tokens)):
    return losses.token_logprobs(
      hidden,
      head,
      tokens,
      mask=mask,
      ref_hidden=ref_hidden,
      ref_head=ref_head,
      chunk_size=chunk_size,
      **options,
    )
  vocab = head.shape[1]
  splits_over_tensor = vocab % mesh.shape["tensor"] == 0
  gathers_rows = _gathers_rows(mesh, tokens.size, vocab)
  vocab_axes = ("tensor",) if splits_over_tensor else ()
  # Axes along which any of the arrays differ, and so all are made to.
  of_rows = batch_axes(mesh)
  axes = (*of_rows, *vocab_axes)
  if gathers_rows:
    # Within its block of `tensor`, each device of `fsdp` has a block.
    vocab_axes = (*vocab_axes, "fsdp")
    chunk_size = _chunk_of_all_rows(mesh, chunk_size)

  def spec_of(matrix: jax.Array) -> P:
    splits = matrix.shape[0] % mesh.shape["fsdp"] == 0
    return P(
      "fsdp" if splits else None, "tensor" if splits_over_tensor else None
    )

  def rows(x: jax.Array) -> jax.Array:
    """Returns the rows that this device computes with."""
    if gathers_rows:
      x = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
    return _vary(x, of_rows, axes)

  def mask_rows(mask: jax.Array) -> jax.Array:
    """The same for the mask, which may not be marked.

    The outputs that it is applied to are sums over the axes that the vocabulary
    is split over. What is marked as different along these would mark them too,
    and their gradients would not be added up. A gather marks, a sum does not.
    """
    if not gathers_rows:
      return mask
    size = len(mask)
    every_row = jnp.zeros(
      (size * mesh.shape["fsdp"], *mask.shape[1:]), jnp.int32
    )
    every_row = jax.lax.dynamic_update_slice_in_dim(
      _vary(every_row, (), of_rows),
      mask.astype(jnp.int32),
      jax.lax.axis_index("fsdp") * size,
      axis=0,
    )
    return jax.lax.psum(every_row, "fsdp") > 0

  def columns(matrix: jax.Array, spec: P) -> jax.Array:
    """Returns the columns that this device computes with."""
    varying = tuple(axis for axis in spec if axis)
    if spec[0] is None:
      matrix = _vary(matrix, varying, (*varying, "fsdp"))
      if gathers_rows:
        size = matrix.shape[1] // mesh.shape["fsdp"]
        start = jax.lax.axis_index("fsdp") * size
        matrix = jax.lax.dynamic_slice_in_dim(matrix, start, size, axis=1)
    elif gathers_rows:
      matrix = jax.lax.all_to_all(
        matrix, "fsdp", split_axis=1, concat_axis=0, tiled=True
      )
    else:
      matrix = matrix.astype(hidden.dtype)
      matrix = jax.lax.all_gather(matrix, "fsdp", axis=0, tiled=True)
    return _vary(matrix, (*varying, "fsdp"), axes)

  spec = spec_of(head)
  ref_spec = spec if ref_head is None else spec_of(ref_head)

  def run(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None,
    ref_hidden: jax.Array | None,
    ref_head: jax.Array | None,
  ) -> losses.TokenLogprobs:
    outputs = losses.token_logprobs(
      rows(hidden),
      columns(head, spec),
      rows(tokens),
      mask=None if mask is None else mask_rows(mask),
      ref_hidden=None if ref_hidden is None else rows(ref_hidden),
      ref_head=None if ref_head is None else columns(ref_head, ref_spec),
      chunk_size=chunk_size,
      vocab_axes=vocab_axes,
      **options,
    )
    if not gathers_rows:
      return outputs
    size = len(tokens)
    start = jax.lax.axis_index("fsdp") * size
    return jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=0), outputs
    )

  batch = P(of_rows)
  return jax.shard_map(
    run,
    in_specs=(batch, spec, batch, batch, batch, ref_spec),
    out_specs=batch,
    axis_names=set(free_axes(mesh)),
  )(hidden, head, tokens, mask, ref_hidden, ref_head)


def position_blocks(rows: int, length: int, vocab: int, chunk_size: int) -> int:
  """Returns how many blocks of positions a device computes at most.

  Args:
    rows: of a micro-batch, over the mesh in force.
    length: of a row.
    vocab: V.
    chunk_size: what `token_logprobs` is given.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if _is_split(mesh, rows):
    gathers_rows = _gathers_rows(mesh, rows * length, vocab)
    rows //= batch_shards(mesh)
    if gathers_rows:
      rows *= mesh.shape["fsdp"]
      chunk_size = _chunk_of_all_rows(mesh, chunk_size)
  return blocks_of_positions(rows, length, chunk_size, masked=True)


def _is_split(mesh: AbstractMesh, rows: int) -> bool:
  """Returns whether every device computes with rows of its own."""
  return not (mesh.empty or mesh.size == 1 or rows % batch_shards(mesh))


def _gathers_rows(mesh: AbstractMesh, positions: int, vocab: int) -> bool:
  """Returns whether all hidden states of `fsdp` are no more than the head."""
  fsdp = mesh.shape["fsdp"]
  if fsdp == 1 or vocab % (fsdp * mesh.shape["tensor"]):
    return False
  # Both have D numbers a token or a column, and the head's columns are split
  # over `tensor` before they are gathered.
  positions = positions // batch_shards(mesh) * fsdp
  return positions <= vocab // mesh.shape["tensor"]


def _chunk_of_all_rows(mesh: AbstractMesh, chunk_size: int) -> int:
  """Returns the positions of a block with the rows of all of `fsdp` in it."""
  return max(chunk_size // mesh.shape["fsdp"], 1)


def _vary(
  x: jax.Array, varying: tuple[str, ...], axes: tuple[str, ...]
) -> jax.Array:
  """Marks an array that differs along `varying` as different along `axes`.

  The transpose of the mark is the sum over the devices that hold the same.
  """
  missing = tuple(axis for axis in axes if axis not in varying)
  return jax.lax.pcast(x, missing, to="varying") if missing else x
