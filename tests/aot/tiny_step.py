"""The config of a tiny training step, for the tests of this folder."""

import dataclasses
import importlib.util
import pathlib

from oreo_jax.config import AotConfig, MeshConfig

ROOT = pathlib.Path(__file__).parents[2]


def maze_config(**aot):
  """configs/maze.py with the smallest model that still has layers to scan."""
  path = ROOT / "configs" / "maze.py"
  spec = importlib.util.spec_from_file_location("maze_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  model = dataclasses.replace(
    config.model,
    vocab_size=64,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    unroll=1,
  )
  return dataclasses.replace(
    config,
    model=model,
    mesh=MeshConfig(data=1, fsdp=4, tensor=2),
    train=dataclasses.replace(config.train, batch_size=16, grad_accum=2),
    aot=AotConfig(topology="cpu:8", **aot),
  )
