"""One compilation of a tiny training step that the tests share."""

import pytest
from aot.tiny_step import maze_config

from oreo_jax.aot import compilation


@pytest.fixture(scope="session")
def answer():
  """The answer for the tiny step on eight simulated devices."""
  return compilation.compile_program(maze_config(chip="v5e"))
