"""Checkpoints: other meshes, damage, saves that are cut off."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import processes, tiny

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
    restored = checkpoints.restore(abstract_like(params, shardings))
  tiny.assert_trees_close(restored, params, rtol=0, atol=0)
  for leaf, sharding in zip(
    jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True
  ):
    assert leaf.sharding == sharding
  kernel = restored["layers"]["q"]["kernel"]
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


def flip_a_bit(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
  path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_noticed_or_changes_nothing(tmp_path):
  save(tmp_path / "good", 1, 2)
  files = sorted(p for p in (tmp_path / "good" / "2").rglob("*") if p.is_file())
  assert len(files) > 10
  rng = np.random.default_rng(0)
  outcomes = []
  for number, path in enumerate([*files, *files]):
    copy = tmp_path / str(number)
    shutil.copytree(tmp_path / "good", copy)
    flip_a_bit(copy / path.relative_to(tmp_path / "good"), rng)
    with Checkpoints(copy) as checkpoints:
      restored = checkpoints.restore(abstract(TREE))
      record = checkpoints.record()
      listed = checkpoints.latest_step()
    step = int(restored["b"]["step"]) - 7
    want = jax.tree.map(lambda x, step=step: x + step, TREE)
    tiny.assert_trees_close(restored, want, rtol=0, atol=0)
    assert record == {"step": step, "names": ["x"]}
    assert listed == step
    assert (copy / "2.damaged").exists() == (step == 1)
    outcomes.append(step)
  # Both happen: some files are there for other readers.
  assert set(outcomes) == {1, 2}


def damage(step):
  """Flips a bit where the arrays are listed: no reader can overlook it."""
  flip_middle_bit(largest(step / "tree" / "d"))


def flip_middle_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def test_weights_that_read_well_and_are_others_are_noticed(tmp_path):
  # Noise does not compress: its bits lie in the file as they are, and a reader
  # of the format has no reason to complain.
  bits = np.random.default_rng(0).integers(2**32, size=4096, dtype=np.uint32)
  tree = {"kernel": jnp.asarray(bits), "scale": jnp.ones(3)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree)
  flip_middle_bit(largest(tmp_path / "1"))
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match=r"\['kernel'\] is not what was"):
      checkpoints.restore(abstract(tree), 1)


def test_a_damaged_step_is_set_aside_and_named(tmp_path, caplog):
  save(tmp_path, 1, 2)
  damage(tmp_path / "2")
  with caplog.at_level("WARNING"):
    assert restore(tmp_path)["b"]["step"] == 8
  assert f"{tmp_path}/2 cannot be read" in caplog.text
  assert f"{tmp_path}/2.damaged" in caplog.text
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.damaged"]
  # Its number is free again, also for a second accident.
  assert save(tmp_path, 2) == 2
  damage(tmp_path / "2")
  assert restore(tmp_path)["b"]["step"] == 8


def test_when_none_is_good_they_stay_and_one_error_says_so(tmp_path):
  save(tmp_path, 1, 2)
  for step in ("1", "2"):
    damage(tmp_path / step)
  for _ in range(2):
    with pytest.raises(
      CheckpointError, match="no checkpoint in .* is good"
    ) as e:
      restore(tmp_path)
    for text in (f"{tmp_path}/1 ", f"{tmp_path}/2 ", f"Remove {tmp_path} "):
      assert text in str(e.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_record_of_other_numbers_is_noticed(tmp_path):
  save(tmp_path, 1)
  path = tmp_path / "1" / "record" / "metadata"
  text = path.read_text()
  assert '"step": 1' in text
  path.write_text(text.replace('"step": 1', '"step": 3'))
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="does not match its digest"):
      checkpoints.record()


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
    with pytest.raises(CheckpointError, match="another model") as caught:
      checkpoints.restore(other)
  assert "['a'] is float32[2,3] there and float32[5] here" in str(caught.value)
  # It is not damaged, and stays.
  assert (tmp_path / "1").exists()


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
    shapes = {"a": jax.ShapeDtypeStruct((6,), jnp.float32)}
    restored = checkpoints.restore(shapes)
  np.testing.assert_array_equal(restored["a"], np.arange(6.0))


_SHARED = """
import jax.numpy as jnp
import numpy as np
from oreo_jax.config import MeshConfig
from oreo_jax.sharding import batch_sharding, make_mesh
from oreo_jax.train.checkpoint import Checkpoints

sharding = batch_sharding(make_mesh(MeshConfig()))
rows = jax.make_array_from_callback(
  (4, 4096), sharding,
  lambda place: np.random.default_rng(0).integers(
    2**32, size=(4, 4096), dtype=np.uint32)[place],
)
tree = {"rows": rows}
with Checkpoints(sys.argv[4]) as checkpoints:
  if checkpoints.latest_step() is None:
    checkpoints.save(1, tree)
    more = jax.jit(lambda x: x + jnp.uint32(1))(rows)
    checkpoints.save(2, {"rows": more})
  else:
    shape = jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding)
    restored = checkpoints.restore({"rows": shape})
    same = jax.jit(lambda a, b: (a == b).all())(restored["rows"], rows)
    print("step", checkpoints.latest_step(), bool(same))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["values", "lists", "record"])
def test_processes_pass_over_a_damaged_checkpoint_together(tmp_path, where):
  processes.run(_SHARED, tmp_path, processes=2, devices=2)
  path = {
    # Each process writes its shards: one of them alone reads the bad one.
    "values": largest(tmp_path / "2" / "tree"),
    "lists": largest(tmp_path / "2" / "tree" / "d"),
    "record": tmp_path / "2" / "record" / "metadata",
  }[where]
  flip_middle_bit(path)
  for output in processes.run(_SHARED, tmp_path, processes=2, devices=2):
    assert "step 1 True" in output
  assert (tmp_path / "2.damaged").exists()
