"""What crosses the copies of the weights does not grow with micro-batches."""

import dataclasses

from aot.tiny_step import maze_config

from oreo_jax import memory
from oreo_jax.aot import costs, groups, hlo, program
from oreo_jax.config import MeshConfig
from oreo_jax.sharding import make_mesh


def test_gradients_cross_the_data_axes_once_a_step():
  config = maze_config()
  config = dataclasses.replace(
    config,
    mesh=MeshConfig(dcn_data=2, data=2, fsdp=2),
    train=dataclasses.replace(config.train, batch_size=32, grad_accum=4),
  )
  mesh = make_mesh(config.mesh)
  made = program.train_program(config, mesh)
  text = made.lower().compile().as_text()
  # As if each pair of devices with a copy of the weights were a slice.
  copies = groups.Slices([device // 2 for device in range(8)])
  crossing = [
    item
    for item in costs.count(hlo.parse(text), copies).collectives
    if item.crosses_slices
  ]
  assert crossing and all(item.times == 1 for item in crossing)
  gradients = sum(
    memory.bytes_on_device(tree)
    for name, tree in made.arguments.items()
    if name.startswith("weights")
  )
  # Over a ring of four copies a sum sends 2 x 3/4 of the array. Metrics, and
  # what the means are divided by, come on top.
  sent = sum(item.sent for item in crossing)
  assert 1.5 * gradients <= sent < 1.6 * gradients
