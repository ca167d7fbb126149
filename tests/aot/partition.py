"""Compiles programs in a process whose stderr is the compiler's.

`python partition.py look-up|plain < CONFIGS`, where CONFIGS is a JSON list of
resolved configs for one machine. `plain` reads the embedding by a plain gather,
as the decoder did once.
"""

import json
import sys

import jax

from oreo_jax.aot import topology
from oreo_jax.aot.program import PROGRAMS
from oreo_jax.config import from_dict
from oreo_jax.models import decoder
from oreo_jax.sharding import make_mesh


def gather(table, tokens, dtype):
  return table[tokens].astype(dtype)


def main(look_up):
  # The partitioner comes before all that makes a program fast.
  jax.config.update("jax_disable_most_optimizations", True)
  if look_up == "plain":
    decoder.embed = gather
  for values in json.load(sys.stdin):
    config = from_dict(values)
    machine = topology.parse(config.aot.topology)
    mesh = make_mesh(config.mesh, topology.find_devices(machine))
    PROGRAMS[config.aot.what](config, mesh).lower().compile()
    print("compiled", flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
