"""`oreo train` on the meshes of eight devices, over 1, 2 and 4 processes."""

import itertools
import json
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from oracles import processes

from oreo_jax.config import (
  Config,
  DataConfig,
  ModelConfig,
  TrainConfig,
  to_dict,
)
from oreo_jax.metrics import read_metrics

STEPS = 20
REFERENCE = (1, 8, 1, 1)
# Every way to give the eight devices of one slice to the axes. What dcn_data
# takes from data moves no device (tests/test_sharding.py holds it for each of
# the sizes), and both split the same dimensions of the same arrays: a mesh with
# dcn_data alone, and with each of the others, is enough.
ONE_PROCESS = [
  *((1, *sizes) for sizes in itertools.product((1, 2, 4, 8), repeat=3)
    if math.prod(sizes) == 8),
  (8, 1, 1, 1), (2, 4, 1, 1), (2, 1, 4, 1), (4, 1, 1, 2),
]  # fmt: skip
# Over several processes the program of a mesh is the one that it has in one
# process. What differs is who loads which rows, gathers which figures and saves
# which shards, and that follows from the axes that go from process to process,
# the first ones of a mesh. So each set of such axes has one mesh here, where
# dcn_data and data count as one.
LAYOUTS = {
  1: ONE_PROCESS,
  2: [
    (2, 1, 2, 2),  # dcn_data
    (1, 4, 2, 1),  # data
    (1, 1, 4, 2),  # fsdp
    (1, 1, 1, 8),  # tensor
  ],
  4: [
    (2, 1, 2, 2),  # dcn_data and fsdp
    (1, 2, 1, 4),  # data and tensor
    (1, 1, 4, 2),  # fsdp
    (1, 1, 2, 4),  # fsdp and tensor
    (1, 1, 1, 8),  # tensor
  ],
}


def write_rows(path):
  """Answers of many lengths to some problems, right and wrong ones."""
  rng = np.random.default_rng(0)
  with path.open("w") as file:
    for problem, attempt in itertools.product(range(60), range(4)):
      digits = rng.integers(0, 10, rng.integers(1, 16))
      row = {
        "prompt": f"{problem}?",
        "response": "".join(map(str, digits)),
        "reward": int((problem + attempt) % 3 == 0),
      }
      file.write(json.dumps(row) + "\n")


def config_of(path):
  """A run on the rows of a file, the value measured on some of them."""
  return Config(
    data=DataConfig(
      path=str(path), tokenizer="byte", row_length=32, held_out=0.2
    ),
    model=ModelConfig(
      embed_dim=32,
      num_layers=1,
      num_heads=8,
      num_kv_heads=4,
      head_dim=4,
      mlp_dim=64,
    ),
    train=TrainConfig(
      batch_size=8,
      epochs=100.0,
      max_steps=STEPS,
      lr=3e-3,
      critic_lr=3e-3,
      # With the usual one, Adam makes a step of full size of a gradient that
      # is nothing but rounding.
      eps=1e-3,
      log_every=1,
      checkpoint_every=0,
      loss_chunk=16,
    ),
  )


# What `oreo train` does with its flags, once a mesh.
_TRAIN = """
import dataclasses
import json

from oreo_jax.config import MeshConfig, from_dict
from oreo_jax.sharding import AXES
from oreo_jax.stages import STAGES, Workspace

jax.config.update("jax_disable_most_optimizations", True)
config = from_dict(json.loads(sys.argv[4]))
for sizes in json.loads(sys.argv[5]):
  mesh = MeshConfig(**dict(zip(AXES, sizes)))
  folder = sys.argv[6] + "/" + "x".join(map(str, sizes))
  workspace = Workspace(dataclasses.replace(config, mesh=mesh), folder)
  with jax.set_mesh(workspace.mesh):
    STAGES["train"].run(workspace, lambda text: None)
"""


def train(folder, count):
  """Trains on the meshes of a number of processes; returns the folder."""
  write_rows(folder / "rows.jsonl")
  directory = folder / f"{count}_processes"
  processes.run(
    _TRAIN,
    json.dumps(to_dict(config_of(folder / "rows.jsonl"))),
    json.dumps(LAYOUTS[count]),
    directory,
    processes=count,
    devices=8 // count,
    timeout=3600,
  )
  return directory


def folder_of(directory, sizes):
  return directory / "x".join(map(str, sizes))


def read_checkpoint(run):
  """Returns what Orbax wrote after the last step, as NumPy arrays by name.

  They are the weights, the moments, and the step, of which the data is a
  function.
  """
  path = run / "oreo" / "checkpoints" / str(STEPS) / "tree"
  with ocp.PyTreeCheckpointer() as reader:
    shapes = reader.metadata(path).item_metadata.tree
    arguments = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes
    )
    tree = reader.restore(path, restore_args=arguments)
  return {
    jax.tree_util.keystr(place): leaf
    for place, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_runs_agree(run, reference):
  """Compares the figures of every step, and the checkpoints of the last."""
  rows, want = (
    read_metrics(folder / "oreo" / "metrics.jsonl")
    for folder in (run, reference)
  )
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  for name in ("batch/tokens", "batch/action_tokens"):
    assert [row[name] for row in rows] == [row[name] for row in want]
  for name in ("loss", "policy/loss", "value/loss"):
    np.testing.assert_allclose(
      [row[name] for row in rows],
      [row[name] for row in want],
      rtol=1e-5,
      atol=1e-5,
      err_msg=f"{run}: {name}",
    )
  assert rows[-1]["heldout/pooled_auc"] == pytest.approx(
    want[-1]["heldout/pooled_auc"], abs=1e-3
  )
  saved, wanted = read_checkpoint(run), read_checkpoint(reference)
  assert saved.keys() == wanted.keys()
  assert saved["['step']"] == STEPS
  for name, array in wanted.items():
    largest = np.max(np.abs(array), initial=0.0)
    np.testing.assert_allclose(
      saved[name], array, rtol=1e-5, atol=1e-5 * largest, err_msg=f"{run}{name}"
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  return train(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.slow
def test_every_mesh_trains_as_every_other(one_process):
  reference = folder_of(one_process, REFERENCE)
  losses = [
    row["loss"] for row in read_metrics(reference / "oreo" / "metrics.jsonl")
  ]
  assert np.ptp(losses) > 0.1  # there is something to learn
  for sizes in LAYOUTS[1]:
    assert_runs_agree(folder_of(one_process, sizes), reference)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_meshes_over_several_processes_train_as_one(
  one_process, tmp_path, count
):
  directory = train(tmp_path, count)
  for sizes in LAYOUTS[count]:
    assert_runs_agree(
      folder_of(directory, sizes), folder_of(one_process, REFERENCE)
    )
