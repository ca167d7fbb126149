"""Meshes, rules and batches; over several slices and processes too."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from oracles import processes, tiny

from oreo_jax import models
from oreo_jax.config import ConfigError, MeshConfig
from oreo_jax.hosts import to_host
from oreo_jax.sharding import (
  AXES,
  batch_shards,
  constrain_batch,
  make_mesh,
  micro_batches,
  process_rows,
  shard_batch,
  shard_whole_batch,
  shardings_of,
)


def test_one_axis_takes_what_is_left():
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
  assert mesh.axis_names == AXES
  assert dict(mesh.shape) == {"dcn_data": 1, "data": 2, "fsdp": 2, "tensor": 2}
  assert batch_shards(mesh) == 4


@pytest.mark.parametrize(
  "sizes, reason",
  [
    ({"fsdp": 3}, "does not divide the 8 devices"),
    ({"data": 2, "fsdp": 2}, "does not divide the 8 devices"),
    ({"data": 16}, "does not divide the 8 devices"),
    ({"fsdp": -1}, "at most one is -1"),
    ({"tensor": 0}, "sizes are positive"),
    ({"tensor": -2}, "sizes are positive"),
  ],
)
def test_a_mesh_that_cannot_be_says_why(sizes, reason):
  with pytest.raises(ConfigError, match=reason):
    make_mesh(MeshConfig(**sizes))


def test_a_mesh_error_names_the_flag():
  with pytest.raises(ConfigError, match="--config.mesh.data=-1"):
    make_mesh(MeshConfig(fsdp=3))


@pytest.mark.parametrize(
  "axes, shape, spec",
  [
    (("embed", "mlp"), (4, 8), ("fsdp", "tensor")),
    ((None, "vocab"), (4, 8), (None, "tensor")),
    # Adapters: along the embedding where there is one, else along the rank.
    (("layers", "embed", "rank"), (3, 4, 4), (None, "fsdp", None)),
    (("layers", "rank", "embed"), (3, 4, 4), (None, None, "fsdp")),
    (("layers", "rank", "mlp"), (3, 4, 8), (None, "fsdp", "tensor")),
    (("layers", "mlp", "rank"), (3, 8, 4), (None, "tensor", "fsdp")),
    # An embedding that does not divide leaves the axis to the rank.
    (("layers", "embed", "rank"), (3, 5, 4), (None, None, "fsdp")),
  ],
)
def test_rules(axes, shape, spec):
  mesh = tiny.mesh(fsdp=4, tensor=2)
  shapes = {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}
  assert shardings_of({"x": axes}, shapes, mesh)["x"].spec == PartitionSpec(
    *spec
  )


def test_a_dimension_that_does_not_divide_stays_whole():
  mesh = tiny.mesh(fsdp=2, tensor=4)
  axes = {"x": ("embed", "heads", "head_dim")}
  shapes = {"x": jax.ShapeDtypeStruct((6, 3, 8), jnp.float32)}
  assert shardings_of(axes, shapes, mesh)["x"].spec == PartitionSpec(
    "fsdp", None, None
  )


def test_weights_are_really_split():
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  params = tiny.place(tiny.draw_params(), tiny.MODEL, mesh)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    shard = leaf.addressable_shards[0].data
    shards = 1 if path[-1].key == "scale" else 4
    # One key/value head a shard, every matrix over fsdp and tensor.
    assert shard.size * shards == leaf.size, path
  assert models.count_params(params) > 1000


def test_rows_of_a_batch_are_split_and_come_back():
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  batch = {"x": np.arange(24).reshape(8, 3)}
  sharded = shard_batch(batch, mesh, rows=8)["x"]
  assert sharded.addressable_shards[0].data.shape == (2, 3)
  assert sharded.sharding.spec == PartitionSpec(("dcn_data", "data", "fsdp"))
  np.testing.assert_array_equal(to_host(sharded), batch["x"])


@pytest.mark.parametrize("rows, wanted", [(8, 16), (6, None)])
def test_rows_that_are_not_the_batch_are_refused(rows, wanted):
  mesh = tiny.mesh(data=4)
  with pytest.raises(ValueError, match="process_index=0, process_count=1"):
    shard_batch(np.zeros((rows, 2)), mesh, rows=wanted)


def test_constrain_batch_is_free_outside_a_mesh_and_for_odd_sizes():
  x = jnp.zeros((3, 2))
  assert constrain_batch(x) is x
  with jax.set_mesh(tiny.mesh(data=8)):
    assert constrain_batch(x) is x
    y = jax.jit(constrain_batch)(jnp.zeros((8, 2)))
  assert y.addressable_shards[0].data.shape == (1, 2)


def test_whole_batches_are_split_over_the_mesh():
  mesh = tiny.mesh(data=4, tensor=2)
  rows = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8)}
  sharded = shard_whole_batch(rows, mesh)
  assert {x.sharding.spec for x in sharded.values()} == {
    PartitionSpec(("dcn_data", "data", "fsdp"))
  }
  assert sharded["a"].addressable_shards[0].data.shape == (2, 3)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), rows)


def test_micro_batches_take_every_nth_row():
  rows = micro_batches({"a": jnp.arange(12).reshape(6, 2)}, 3)["a"]
  np.testing.assert_array_equal(rows[..., 0] // 2, [[0, 3], [1, 4], [2, 5]])


# --- Slices and processes that this machine does not have.


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh is laid out by."""

  id: int
  process_index: int
  slice_index: int = 0
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5p"


def torus(x, y, z, *, kind, tray, slices=1):
  """The chips of TPU slices, a process to every tray of x times y chips."""
  chips = [
    (i, j, k, s)
    for s in range(slices)
    for k in range(z)
    for j in range(y)
    for i in range(x)
  ]
  trays = sorted({(s, k, j // tray[1], i // tray[0]) for i, j, k, s in chips})
  return [
    Device(
      id=number,
      process_index=trays.index((s, k, j // tray[1], i // tray[0])),
      slice_index=s,
      coords=(i, j, k),
      device_kind=kind,
    )
    for number, (i, j, k, s) in enumerate(chips)
  ]


def hosts_of(count, devices, *, platform="cpu", slices=False):
  """Processes of this many devices each, in order."""
  return [
    Device(i, i // devices, i // devices if slices else 0, platform=platform)
    for i in range(count * devices)
  ]


def v5e(slices=1):
  return torus(4, 4, 1, kind="TPU v5 lite", tray=(2, 2), slices=slices)


def test_slices_lie_along_dcn_data():
  for sizes in ({"fsdp": -1}, {"data": 2, "fsdp": -1, "tensor": 4}):
    config = MeshConfig(**{"data": 1, "dcn_data": 2, **sizes})
    mesh = make_mesh(config, v5e(slices=2))
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert mesh.devices.shape[0] == 2 and mesh.devices.size == 32
    for number, devices in enumerate(mesh.devices):
      assert {d.slice_index for d in devices.flat} == {number}


def test_slices_and_dcn_data_must_agree():
  with pytest.raises(ConfigError, match="dcn_data=2.*16 devices of a slice"):
    make_mesh(MeshConfig(data=-1), v5e(slices=2))
  with pytest.raises(ConfigError, match="dcn_data=2"):
    make_mesh(MeshConfig(data=-1, dcn_data=4), v5e(slices=2))
  assert make_mesh(MeshConfig(dcn_data=-1, data=4, fsdp=4), v5e(slices=2))


def test_gpu_hosts_are_slices_that_any_axis_may_cross():
  devices = hosts_of(2, 8, platform="gpu", slices=True)
  mesh = make_mesh(MeshConfig(data=1, fsdp=16), devices)
  assert [d.id for d in mesh.devices.flat] == list(range(16))
  mesh = make_mesh(MeshConfig(dcn_data=2, data=1, fsdp=-1), devices)
  assert {d.slice_index for d in mesh.devices[1].flat} == {1}


@pytest.mark.parametrize("tensor", [2, 4, 8, 16])
def test_a_torus_axis_is_split_where_the_sizes_ask_for_it(tensor):
  devices = torus(4, 4, 4, kind="TPU v5p", tray=(2, 2))
  config = MeshConfig(data=1, fsdp=-1, tensor=tensor)
  mesh = make_mesh(config, devices)
  assert mesh.devices.shape == (1, 1, 64 // tensor, tensor)
  assert set(mesh.devices.flat) == set(devices)


def test_slices_that_cannot_be_laid_out_are_one_error():
  uneven = v5e() + [dataclasses.replace(d, slice_index=1) for d in v5e()[:8]]
  with pytest.raises(ConfigError, match="24 devices on 2 slices.*fits a slice"):
    make_mesh(MeshConfig(dcn_data=2, data=-1), uneven)
  hole = v5e()[:15]
  with pytest.raises(ConfigError, match="no sizes fit; use all devices"):
    make_mesh(MeshConfig(data=-1), hole)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_dcn_data_takes_from_data_and_moves_no_device(count):
  devices = hosts_of(count, 8 // count, slices=True)
  for sizes in itertools.product((1, 2, 4, 8), repeat=4):
    if np.prod(sizes) == 8:
      dcn_data, data, fsdp, tensor = sizes
      mesh = make_mesh(
        MeshConfig(**dict(zip(AXES, sizes, strict=True))), devices
      )
      joined = MeshConfig(data=dcn_data * data, fsdp=fsdp, tensor=tensor)
      np.testing.assert_array_equal(
        mesh.devices.reshape(dcn_data * data, fsdp, tensor),
        make_mesh(joined, devices).devices[0],
      )


SHARES = [
  (hosts_of(2, 4), {"data": 8}, 2),
  (hosts_of(2, 4), {"data": 4, "tensor": 2}, 2),
  (hosts_of(2, 4), {"tensor": 8}, 1),
  (hosts_of(4, 2), {"data": 2, "tensor": 4}, 2),
  (hosts_of(4, 2), {"fsdp": 4, "tensor": 2}, 4),
  (hosts_of(4, 4), {"data": 2, "tensor": 8}, 2),
  # The chips of a process are no neighbours on the ring that fsdp gets here.
  (v5e(), {"fsdp": 16}, 4),
  (v5e(), {"fsdp": 4, "tensor": 4}, 2),
  (v5e(), {"data": 2, "fsdp": 4, "tensor": 2}, None),
  (v5e(2), {"dcn_data": 2, "fsdp": 4, "tensor": 4}, 4),
  (torus(4, 4, 4, kind="TPU v5p", tray=(2, 2)), {"fsdp": 64}, 16),
]


@pytest.mark.parametrize("devices, sizes, count", SHARES)
def test_shares_of_processes_cover_the_batch_once(devices, sizes, count):
  mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), devices)
  by_share = {}
  for process in sorted({d.process_index for d in devices}):
    index, total = process_rows(mesh, process)
    if count is not None:
      assert total == count
    rows = {
      shard
      for shard, held in enumerate(mesh.devices.reshape(batch_shards(mesh), -1))
      if process in {d.process_index for d in held}
    }
    assert by_share.setdefault(index, rows) == rows
  assert sorted(by_share) == list(range(total))
  shards = [shard for rows in by_share.values() for shard in rows]
  assert sorted(shards) == list(range(batch_shards(mesh)))


def test_shares_that_overlap_in_part_are_refused():
  # Tensor shards of three devices on hosts of two.
  devices = np.array(hosts_of(3, 2)).reshape(1, 2, 1, 3)
  mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)
  with pytest.raises(ConfigError, match="tensor divide the 2 devices"):
    process_rows(mesh, 0)


_ROWS = """
import json
import numpy as np
from oreo_jax.config import MeshConfig
from oreo_jax.hosts import to_host
from oreo_jax.sharding import make_mesh, process_rows, shard_batch

for sizes in json.loads(sys.argv[4]):
  mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
  index, count = process_rows(mesh)
  rows = np.arange(48).reshape(16, 3)
  share = 16 // count
  mine = rows[index * share : (index + 1) * share]
  x = shard_batch({"x": mine}, mesh, rows=16)["x"]
  assert x.shape == rows.shape, (sizes, x.shape)
  joined = np.asarray(to_host(x))
  np.testing.assert_array_equal(np.sort(joined, axis=0), rows)
  for shard in x.addressable_shards:
    # What is called a replica is one.
    np.testing.assert_array_equal(shard.data, joined[shard.index])
  if count > 1:
    try:
      shard_batch(mine[: len(mine) // 2], mesh, rows=16)
    except ValueError as error:
      assert f"process_index={index}, process_count={count}" in str(error)
    else:
      raise AssertionError("a batch that shrank was accepted")
print("rows agree")
"""


@pytest.mark.slow
@pytest.mark.parametrize("count, devices", [(2, 4), (4, 2)])
def test_rows_of_several_processes_make_one_batch(count, devices):
  sizes = '[{"data": 8}, {"tensor": 8}, {"data": 2, "tensor": 4}, '
  sizes += '{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]'
  for output in processes.run(_ROWS, sizes, processes=count, devices=devices):
    assert "rows agree" in output


@pytest.mark.slow
def test_the_tpu_compilers_slices_give_a_mesh():
  pytest.importorskip("libtpu", reason="needs the TPU compiler: libtpu")
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:4x4", num_slices=2
  )
  config = MeshConfig(dcn_data=2, data=1, fsdp=-1, tensor=4)
  mesh = make_mesh(config, topology.devices)
  assert mesh.devices.shape == (2, 1, 4, 4)
  assert [len({d.slice_index for d in half.flat}) for half in mesh.devices] == [
    1,
    1,
  ]
