"""The partitioner never gives up: no array is made whole on every device.

Where it finds no way from one sharding to another it says so in its log, makes
the array whole everywhere and cuts it again. The step stays right, and becomes
slow and large.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from aot.tiny_step import ROOT, maze_config

from oreo_jax.aot import topology
from oreo_jax.config import CriticConfig, MeshConfig, to_dict
from oreo_jax.models.presets import preset

MESSAGE = "Involuntary full rematerialization"
MESHES = (
  {"fsdp": 8},
  {"fsdp": 4, "tensor": 2},
  {"data": 2, "fsdp": 2, "tensor": 2},
)


def make(mesh, *, critic="separate", grad_accum=1, what="train", **model):
  config = maze_config(what=what)
  return dataclasses.replace(
    config,
    mesh=MeshConfig(**{"data": 1, **mesh}),
    model=dataclasses.replace(config.model, **model),
    critic=CriticConfig(kind=critic),
    train=dataclasses.replace(config.train, grad_accum=grad_accum),
    collect=dataclasses.replace(
      config.collect, batch_size=32, samples=2, max_new_tokens=7
    ),
    evaluate=dataclasses.replace(
      config.evaluate, batch_size=32, budgets=(2,), max_new_tokens=7
    ),
  )


def partitioner_log(configs, look_up="look-up"):
  """Returns what the compiler writes while it compiles the configs."""
  machine = topology.parse(configs[0].aot.topology)
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  run = subprocess.run(
    [sys.executable, pathlib.Path(__file__).with_name("partition.py"), look_up],
    input=json.dumps([to_dict(config) for config in configs]),
    env=os.environ
    | topology.environment(machine)
    | {
      "PYTHONPATH": os.pathsep.join(filter(None, paths)),
      "TF_CPP_MIN_LOG_LEVEL": "0",
      "TPU_MIN_LOG_LEVEL": "0",
      "TPU_STDERR_LOG_LEVEL": "0",
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.stdout.split() == ["compiled"] * len(configs), run.stderr
  return run.stderr


def messages(log):
  return [line for line in log.splitlines() if MESSAGE in line]


def test_a_step_is_partitioned_without_a_last_resort():
  assert messages(partitioner_log([make(MESHES[2])])) == []


@pytest.mark.slow
def test_a_plain_gather_of_the_embedding_would_be_seen():
  # What the test above looks for, and where: else it could never fail.
  assert messages(partitioner_log([make(MESHES[2])], "plain"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_is_partitioned_without_a_last_resort(mesh):
  configs = [
    make(mesh, critic=critic, grad_accum=grad_accum)
    for critic in ("separate", "lora")
    for grad_accum in (1, 2)
  ]
  configs += [make(mesh, what=what) for what in ("decode", "search")]
  assert messages(partitioner_log(configs)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh", [{"fsdp": 16}, {"data": 2, "fsdp": 4, "tensor": 2}], ids=str
)
def test_the_compiler_for_tpus_finds_a_way_as_well(mesh):
  pytest.importorskip("libtpu", reason="needs the TPU compiler: libtpu")
  model = preset(
    "tiny-qwen2", vocab_size=2048, embed_dim=256, head_dim=128, mlp_dim=1024
  )
  configs = []
  for what in ("train", "decode"):
    config = make(mesh, what=what)
    config.model = dataclasses.replace(model, dtype="bfloat16", remat="full")
    config.aot.topology = "v5e:4x4"
    configs.append(config)
  assert messages(partitioner_log(configs)) == []
  log = partitioner_log(configs[:1], "plain")
  assert messages(log) or "tensor" not in mesh
