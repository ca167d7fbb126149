"""Looking tokens up in the embedding, on a mesh as well."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from oreo_jax.sharding import batch_axes, batch_shards, free_axes


def embed(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns the rows of a table, [B, T, D] in `dtype`.

  The table is split over `fsdp` along D and over `tensor` along V, and the rows
  over `fsdp` as well. The partitioner would gather the table, or the embedding
  of the whole batch, on every device. Here each device looks up the tokens of
  all rows of `fsdp` in the piece of the table it holds, and the results change
  places: what crosses the mesh is as large as the embedding of one's own rows.
  The gradient takes the same way back, and is added up where its piece lies.

  Args:
    table: [V, D].
    tokens: i32[B, T].
    dtype: of the result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or len(tokens) % batch_shards(mesh):
    # Rows that do not divide are left to the partitioner.
    return jnp.take(table, tokens, axis=0).astype(dtype)
  # A dimension that does not divide is whole on every device.
  splits_vocab = table.shape[0] % mesh.shape["tensor"] == 0
  splits_width = table.shape[1] % mesh.shape["fsdp"] == 0

  def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    if splits_width:
      tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
    if splits_vocab:
      tokens = tokens - jax.lax.axis_index("tensor") * len(table)
      held = (tokens >= 0) & (tokens < len(table))
      rows = jnp.take(table, jnp.where(held, tokens, 0), axis=0)
      rows = jnp.where(held[..., None], rows.astype(dtype), 0)
      # One device has the row of a token, the others have zeros.
      rows = jax.lax.psum(rows, "tensor")
    else:
      rows = jnp.take(table, tokens, axis=0).astype(dtype)
    if splits_width:
      rows = jax.lax.all_to_all(
        rows, "fsdp", split_axis=0, concat_axis=2, tiled=True
      )
    return rows

  spec = P("tensor" if splits_vocab else None, "fsdp" if splits_width else None)
  rows = P(batch_axes(mesh))
  return jax.shard_map(
    look_up,
    in_specs=(spec, rows),
    out_specs=rows,
    axis_names=set(free_axes(mesh)),
  )(table, tokens)
