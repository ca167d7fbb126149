"""Meshes, logical-axis rules, and how host batches become global arrays.

Parameters name their dimensions by meaning ("embed", "heads", ...); `RULES`
says which mesh axis each meaning is split over. Weights are split over `fsdp`
along the embedding and over `tensor` along heads, MLP columns and vocabulary;
batches are split over every data-like axis.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from oreo_jax.config import ConfigError, MeshConfig

AXES = ("dcn_data", "data", "fsdp", "tensor")
BATCH_AXES = ("dcn_data", "data", "fsdp")

RULES: Mapping[str, str | None] = {
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "rank": None,
  "norm": None,
  "value": None,
}


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
  """Builds the device mesh.

  Args:
    config: sizes of the axes; at most one is -1 and takes what is left.
    devices: the devices to use; all of them by default.

  Returns:
    A mesh with the axes `dcn_data`, `data`, `fsdp`, `tensor`.

  Raises:
    ConfigError: when the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [getattr(config, axis) for axis in AXES]
  text = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise ConfigError(
      f"config.mesh ({text}): sizes are positive, at most one is -1"
    )
  known = int(np.prod([s for s in sizes if s != -1]))
  if len(devices) % known or (-1 not in sizes and known != len(devices)):
    raise ConfigError(
      f"config.mesh ({text}) does not divide the {len(devices)} devices: set "
      "--config.mesh.data=-1 and let the others multiply to a divisor"
    )
  sizes = [len(devices) // known if s == -1 else s for s in sizes]
  return jax.make_mesh(
    sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
  )


def spec_of(axes: tuple[str | None, ...]) -> PartitionSpec:
  """Returns the partition of an array whose dimensions mean `axes`."""
  return PartitionSpec(
    *(None if axis is None else RULES[axis] for axis in axes)
  )


def shardings_of(axes: Any, shapes: Any, mesh: Mesh) -> Any:
  """Returns a NamedSharding for every leaf.

  A dimension that its mesh axis does not divide stays whole: small models
  (three heads on four chips) still run, only less split.

  Args:
    axes: tree of tuples of logical axis names.
    shapes: tree of the same structure with arrays or ShapeDtypeStructs.
    mesh: the device mesh.
  """

  def one(axes_of_leaf, leaf):
    spec = spec_of(axes_of_leaf)
    parts = [
      part if part and dim % mesh.shape[part] == 0 else None
      for part, dim in zip(spec, leaf.shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*parts))

  return jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose first dimension is the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
  """Returns into how many parts the mesh splits the batch."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def constrain_batch(x: jax.Array, dim: int = 0) -> jax.Array:
  """Pins dimension `dim` to the batch axes of the mesh in force, if any.

  Without the pin, a weight split over `fsdp` can pull the activations into
  its own layout and every device would compute the whole batch.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.shape[dim] % batch_shards(mesh):
    return x
  spec = PartitionSpec(*(None,) * dim, BATCH_AXES)
  return jax.lax.with_sharding_constraint(x, spec)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Makes global arrays of the rows that each process holds.

  Args:
    batch: tree of host arrays, the process-local rows first.
    mesh: the device mesh.

  Returns:
    The same tree with global `jax.Array`s, split over the batch axes.
  """
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch,
  )


def shard_whole_batch(batch: Any, mesh: Mesh) -> Any:
  """Makes global arrays of rows that every process holds, all of them.

  Args:
    batch: tree of host arrays, the same on every process.
    mesh: the device mesh.

  Returns:
    The same tree with global `jax.Array`s, split over the batch axes.
  """
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      np.shape(x), sharding, np.asarray(x).__getitem__
    ),
    batch,
  )


def micro_batches(batch: Any, parts: int) -> Any:
  """Splits the rows: [B, ...] to [parts, B / parts, ...].

  Row i of part p is row i * parts + p: each device keeps its own rows.
  """

  def split(x):
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(split, batch)
