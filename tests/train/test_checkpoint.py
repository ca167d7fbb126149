"""Checkpoints: other meshes, damage, saves that are cut off."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.sharding import shardings_of
from oreo_jax.train.checkpoint import (
  CheckpointError,
  Checkpoints,
  abstract_like,
)

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"step": jnp.int32(7)}}


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def save(directory, *steps, **options):
  with Checkpoints(directory, **options) as checkpoints:
    for step in steps:
      tree = jax.tree.map(lambda x, step=step: x + step, TREE)
      checkpoints.save(step, tree, {"step": step, "names": ["x"]})
    return checkpoints.latest_step()


def restore(directory, step=None):
  with Checkpoints(directory) as checkpoints:
    return checkpoints.restore(abstract(TREE), step)


def test_round_trip_with_record(tmp_path):
  assert save(tmp_path, 3) == 3
  want = jax.tree.map(lambda x: x + 3, TREE)
  tiny.assert_trees_close(restore(tmp_path), want, rtol=0, atol=0)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.record() == {"step": 3, "names": ["x"]}


def test_the_newest_are_kept(tmp_path):
  assert save(tmp_path, 1, 2, 3, keep=2) == 3
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_an_existing_step_is_kept_as_it_is(tmp_path):
  save(tmp_path, 1)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, jax.tree.map(jnp.zeros_like, TREE))
  assert restore(tmp_path)["b"]["step"] == 8


@pytest.mark.parametrize(
  "one, other",
  [
    ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4}),
    ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}),
  ],
)
def test_restores_onto_another_mesh(tmp_path, one, other):
  params = tiny.draw_params()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tiny.place(params, tiny.MODEL, tiny.mesh(**one)))
    axes = models.logical_axes(tiny.MODEL)
    shardings = shardings_of(axes, params, tiny.mesh(**other))
    found = checkpoints.restore(abstract_like(params, shardings))
  tiny.assert_trees_close(found, params, rtol=0, atol=0)
  for leaf, sharding in zip(
    jax.tree.leaves(found), jax.tree.leaves(shardings), strict=True
  ):
    assert leaf.sharding == sharding
  kernel = found["layers"]["q"]["kernel"]
  assert len(kernel.sharding.device_set) == np.prod(list(other.values()))


def test_no_checkpoint_is_an_error_that_says_so(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() is None
    with pytest.raises(CheckpointError, match="holds no checkpoint") as caught:
      checkpoints.restore(abstract(TREE))
  assert str(tmp_path) in str(caught.value)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(directory):
  files = [p for p in directory.rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
  "damage",
  [
    lambda step: cut(largest(step / "tree" / "d")),
    lambda step: shutil.rmtree(step / "tree"),
    lambda step: (step / "tree" / "_METADATA").write_text("{"),
  ],
  ids=["cut", "gone", "metadata"],
)
def test_damage_is_one_error_that_names_the_directory(tmp_path, damage):
  save(tmp_path, 1, 2)
  damage(tmp_path / "2")
  with pytest.raises(CheckpointError, match="cannot be read") as caught:
    restore(tmp_path, 2)
  assert f"{tmp_path}/2" in str(caught.value)
  # The older one is still good.
  assert restore(tmp_path, 1)["b"]["step"] == 8


def test_another_model_is_an_error(tmp_path):
  save(tmp_path, 1)
  other = {"a": jax.ShapeDtypeStruct((5,), jnp.float32), "c": TREE["a"]}
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="another model"):
      checkpoints.restore(other)


def test_what_a_cut_off_save_leaves_is_not_a_checkpoint(tmp_path):
  save(tmp_path, 1)
  left = tmp_path / "2.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "1", left)
  cut(largest(left))
  assert save(tmp_path) == 1
  assert restore(tmp_path)["b"]["step"] == 8
  # And the step can be saved afterwards.
  assert save(tmp_path, 2) == 2
  assert restore(tmp_path)["b"]["step"] == 9


_KILLED = """
import os, sys
import jax.numpy as jnp
from oreo_jax.train.checkpoint import Checkpoints

def die(*unused_args, **unused_options):
  os._exit(9)

tree = {"a": jnp.arange(6.0)}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, tree)
# The last moment before the checkpoint gets its name.
os.rename = os.replace = die
checkpoints.save(2, tree)
"""


@pytest.mark.slow
def test_a_process_killed_at_the_rename_leaves_the_older_one(tmp_path):
  done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)])
  assert done.returncode == 9
  assert not (tmp_path / "2").exists()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1
    found = checkpoints.restore({"a": jax.ShapeDtypeStruct((6,), jnp.float32)})
  np.testing.assert_array_equal(found["a"], np.arange(6.0))
