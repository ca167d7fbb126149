"""Meshes, logical-axis rules, and how host batches become global arrays.

Parameters name their dimensions by meaning ("embed", "heads", ...); `RULES`
says which mesh axis each meaning is split over. Weights are split over `fsdp`
along the embedding and over `tensor` along heads, MLP columns and vocabulary;
batches are split over every data-like axis.

On several processes each loads the rows that its devices hold, and no others:
`process_rows` says which, `shard_batch` joins them to the global batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
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

# An axis of the mesh splits one dimension of an array. Where several ask for
# it, the one that stands first here gets it: an adapter is split along its rank
# only where it has no embedding.
RULES: Mapping[str, str | None] = {
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "rank": "fsdp",
  "norm": None,
  "value": None,
}


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
  """Builds the device mesh.

  Neighbours along an axis are neighbours in the machine's network where it has
  one; a torus axis is split between two mesh axes where the sizes ask for it.
  On several TPU slices, `dcn_data` counts them, and nothing but the sum of the
  gradients crosses the network between them.

  Args:
    config: sizes of the axes; at most one is -1 and takes what is left.
    devices: the devices to use; all of them by default.

  Returns:
    A mesh with the axes `dcn_data`, `data`, `fsdp`, `tensor`.

  Raises:
    ConfigError: when the sizes do not multiply to the number of devices, or do
      not fit the slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [getattr(config, axis) for axis in AXES]
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise ConfigError(f"{_named(sizes)}: sizes are positive, at most one is -1")
  known = int(np.prod([s for s in sizes if s != -1]))
  if len(devices) % known or (-1 not in sizes and known != len(devices)):
    raise ConfigError(
      f"{_named(sizes)} does not divide the {len(devices)} devices: set "
      "--config.mesh.data=-1 and let the others multiply to a divisor"
    )
  sizes = [len(devices) // known if s == -1 else s for s in sizes]
  return Mesh(
    _arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def _arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
  """Returns the devices as an array of these sizes, good for the network."""
  # GPUs and CPUs have slices too, one a host; there any axis may cross hosts.
  slices = len({_slice_of(device) for device in devices})
  if slices > 1 and sizes[0] != slices and devices[0].platform == "tpu":
    raise ConfigError(
      f"{_named(sizes)} does not fit {len(devices)} devices on {slices} "
      f"slices: set --config.mesh.dcn_data={slices}, and let the others "
      f"multiply to the {len(devices) // slices} devices of a slice"
    )
  try:
    if slices > 1 and sizes[0] == slices:
      return mesh_utils.create_hybrid_device_mesh(
        (1, *sizes[1:]),
        (slices, 1, 1, 1),
        devices,
        allow_split_physical_axes=True,
      )
    return mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  except (AssertionError, NotImplementedError, ValueError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ConfigError(
      f"{_named(sizes)} cannot be laid out on {len(devices)} devices on "
      f"{slices} slices ({reason}): {_sizes_that_fit(devices)}"
    ) from error


def _sizes_that_fit(devices: Sequence[Any]) -> str:
  """Says which sizes can be had on the devices of the first slice."""
  first = [d for d in devices if _slice_of(d) == _slice_of(devices[0])]
  fit = []
  for tensor in range(1, len(first) + 1):
    if len(first) % tensor == 0:
      fsdp = len(first) // tensor
      try:
        mesh_utils.create_device_mesh(
          (1, 1, fsdp, tensor), first, allow_split_physical_axes=True
        )
      except (AssertionError, NotImplementedError, ValueError):
        continue
      fit.append(
        f"--config.mesh.fsdp={fsdp} with --config.mesh.tensor={tensor}"
      )
  if not fit:
    return "no sizes fit; use all devices of whole slices of one shape"
  return "what fits a slice is " + ", ".join(fit)


def _slice_of(device: Any) -> int:
  # CPU devices of one process have no such attribute.
  return getattr(device, "slice_index", None) or 0


def _named(sizes: Sequence[int]) -> str:
  pairs = zip(AXES, sizes, strict=True)
  return f"config.mesh ({', '.join(f'{axis}={size}' for axis, size in pairs)})"


def shardings_of(axes: Any, shapes: Any, mesh: Mesh) -> Any:
  """Returns a NamedSharding for every leaf.

  A dimension that its mesh axis does not divide stays whole: small models
  (three heads on four chips) still run, only less split.

  Args:
    axes: tree of tuples of logical axis names.
    shapes: tree of the same structure with arrays or ShapeDtypeStructs.
    mesh: the device mesh.
  """

  def sharding_of(
    axes_of_leaf: tuple[str | None, ...], leaf: Any
  ) -> NamedSharding:
    mesh_axes: list[str | None] = [None] * len(leaf.shape)
    dims = zip(axes_of_leaf, leaf.shape, strict=True)
    named = [(i, name, dim) for i, (name, dim) in enumerate(dims) if name]
    for i, name, dim in sorted(named, key=lambda x: list(RULES).index(x[1])):
      axis = RULES[name]
      if axis and axis not in mesh_axes and dim % mesh.shape[axis] == 0:
        mesh_axes[i] = axis
    return NamedSharding(mesh, PartitionSpec(*mesh_axes))

  return jax.tree.map(
    sharding_of, axes, shapes, is_leaf=lambda x: isinstance(x, tuple)
  )


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Returns the sharding of an array every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose first dimension is the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def free_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """Returns the axes that no `shard_map` around this code has taken over.

  Inside one the arrays are already one device's along the axes it took, and
  neither a constraint nor a `shard_map` further in may name those again.
  """
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(axis for axis, kind in types if kind != AxisType.Manual)


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """Returns the free axes that a batch is split over."""
  return tuple(axis for axis in free_axes(mesh) if axis in BATCH_AXES)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
  """Returns how many shards the free axes of the mesh split a batch into."""
  return int(np.prod([mesh.shape[axis] for axis in batch_axes(mesh)]))


def rows_that_divide(count: int, mesh: Mesh | AbstractMesh) -> int:
  """Returns the least number of rows from `count` on that the shards divide."""
  shards = 1 if mesh.empty else batch_shards(mesh)
  return -(-count // shards) * shards


def process_rows(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
  """Returns which share of a batch's rows a process has to load.

  Processes whose devices hold the same rows, as where `tensor` is larger than
  a host, get the same index. The devices of a process need not be neighbours
  along the batch: on a TPU torus they often are not, and the global batch is
  then the loader's with its rows in another order, which no sum over the batch
  depends on.

  Args:
    mesh: the device mesh.
    process: its index; by default this one.

  Returns:
    (index, count), with 0 <= index < count: good for `data.make_loader` as
    `process_index` and `process_count`.

  Raises:
    ConfigError: when two processes hold some rows in common and others not.
  """
  shards = _shards_of_processes(mesh)
  process = jax.process_index() if process is None else process
  # Sorted by their first shard; which share has which index is not important
  # as long as every process says the same.
  shares = sorted(set(shards.values()))
  lengths = {len(share) for share in shares}
  if len(lengths) > 1 or sum(map(len, shares)) != batch_shards(mesh):
    devices = mesh.devices.size // len(shards)
    raise ConfigError(
      f"{_named(mesh.devices.shape)}: the processes do not hold equal shares "
      "of the batch, or hold some rows in common and others not, so that none "
      "knows which rows to load; let --config.mesh.tensor divide the "
      f"{devices} devices of a process, or be a multiple of them"
    )
  if process not in shards:
    raise ConfigError(
      f"{_named(mesh.devices.shape)}: no device of process {process} is in it; "
      "use the devices of every process"
    )
  return shares.index(shards[process]), len(shares)


@functools.cache  # asked for every batch, and a pod has many devices
def _shards_of_processes(mesh: Mesh) -> dict[int, tuple[int, ...]]:
  """Returns by process the shards of the batch that its devices hold."""
  # The batch axes are the first ones, and their order is that of the shards.
  by_shard = mesh.devices.reshape(batch_shards(mesh), -1)
  shards: dict[int, set[int]] = {}
  for shard, devices in enumerate(by_shard):
    for device in devices:
      shards.setdefault(device.process_index, set()).add(shard)
  return {
    process: tuple(sorted(held)) for process, held in sorted(shards.items())
  }


def constrain_batch(
  x: jax.Array, dim: int = 0, *, heads: int | None = None
) -> jax.Array:
  """Pins dimension `dim` to the batch axes of the mesh in force, if any.

  Without the pin, a weight split over `fsdp` can pull the activations into
  its own layout and every device would compute the whole batch. Rows that do
  not divide over the batch axes are **not** pinned and may cost just that, in
  time and memory: callers round their batches up to a multiple of
  `batch_shards`.

  Args:
    x: an array, whose other dimensions are made whole on every device.
    dim: the dimension of the rows.
    heads: the dimension of key and value heads, if any. It is split as these
      are, over `tensor` where that divides it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.shape[dim] % batch_shards(mesh):
    return x
  spec: list[Any] = [None] * x.ndim
  spec[dim] = batch_axes(mesh)
  axis = RULES["kv_heads"]
  if heads is not None and axis in free_axes(mesh):
    if x.shape[heads] % mesh.shape[axis] == 0:
      spec[heads] = axis
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def shard_batch(batch: Any, mesh: Mesh, *, rows: int | None = None) -> Any:
  """Makes global arrays of the rows that each process has loaded.

  Args:
    batch: tree of host arrays; first dimension: the rows of this process's
      share of the batch, which `process_rows` names.
    mesh: the device mesh.
    rows: rows of the global batch, to be checked; None: whatever comes out.

  Returns:
    The same tree with global `jax.Array`s, split over the batch axes.

  Raises:
    ValueError: when the shares do not add up to `rows`, or do not divide.
  """
  sharding = batch_sharding(mesh)
  index, count = process_rows(mesh)
  shards = _shards_of_processes(mesh)[jax.process_index()]

  def join(x: np.ndarray) -> jax.Array:
    x = np.asarray(x)
    total = len(x) * count
    if total != (rows or total) or len(x) % len(shards):
      raise ValueError(
        f"the batch: expected {rows or 'a number that divides'} rows over "
        f"{count} shares of {len(shards)} shards, got {len(x)} rows for share "
        f"{index}; load with process_index={index}, process_count={count}, and "
        "choose --config.<stage>.batch_size to divide"
      )
    size = len(x) // len(shards)  # rows of a shard

    def rows_of(place: Any) -> np.ndarray:
      # A global place, which is a shard's, to the local one.
      local = shards.index((place[0].start or 0) // size)
      return x[local * size : (local + 1) * size]

    return jax.make_array_from_callback(
      (total, *x.shape[1:]), sharding, rows_of
    )

  return jax.tree.map(join, batch)


def local_rows(array: jax.Array, mesh: Mesh) -> np.ndarray:
  """Returns the rows of this process: what `shard_batch` was given.

  Args:
    array: as `shard_batch` returns it, or computed from such rows with the
      same sharding.
    mesh: the device mesh.
  """
  shards = _shards_of_processes(mesh)[jax.process_index()]
  size = len(array) // batch_shards(mesh)  # rows of a shard
  # Devices along other axes hold copies, of which one is enough.
  blocks = {
    (shard.index[0].start or 0) // size: shard.data
    for shard in array.addressable_shards
  }
  return np.concatenate([np.asarray(blocks[shard]) for shard in shards])


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


def micro_batches(batch: Any, count: int) -> Any:
  """Splits the rows: [B, ...] to [count, B / count, ...].

  Row i of micro-batch m is row i * count + m: each device keeps its own rows.
  """

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(split, batch)
