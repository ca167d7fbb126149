"""Meshes, rules and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from oracles import tiny

from oreo_jax import models
from oreo_jax.config import ConfigError, MeshConfig
from oreo_jax.hosts import to_host
from oreo_jax.sharding import (
  AXES,
  batch_shards,
  constrain_batch,
  make_mesh,
  micro_batches,
  shard_batch,
  shard_whole_batch,
  shardings_of,
  spec_of,
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


def test_rules():
  assert spec_of(("embed", "mlp")) == PartitionSpec("fsdp", "tensor")
  assert spec_of((None, "vocab")) == PartitionSpec(None, "tensor")


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
    parts = 1 if path[-1].key == "scale" else 4
    # One key/value head a shard, every matrix over fsdp and tensor.
    assert shard.size * parts == leaf.size, path
  assert models.count_params(params) > 1000


def test_rows_of_a_batch_are_split_and_come_back():
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  batch = {"x": np.arange(24).reshape(8, 3)}
  found = shard_batch(batch, mesh)["x"]
  assert found.addressable_shards[0].data.shape == (2, 3)
  np.testing.assert_array_equal(to_host(found), batch["x"])


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
  found = shard_whole_batch(rows, mesh)
  assert {x.sharding.spec for x in found.values()} == {
    PartitionSpec(("dcn_data", "data", "fsdp"))
  }
  assert found["a"].addressable_shards[0].data.shape == (2, 3)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), rows)


def test_micro_batches_take_every_nth_row():
  found = micro_batches({"a": jnp.arange(12).reshape(6, 2)}, 3)["a"]
  np.testing.assert_array_equal(found[..., 0] // 2, [[0, 3], [1, 4], [2, 5]])
