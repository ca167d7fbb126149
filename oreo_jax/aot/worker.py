"""The process that compiles: `python -m oreo_jax.aot.worker REQUEST ANSWER`."""

from __future__ import annotations

import sys

from oreo_jax import files
from oreo_jax.aot.compilation import compile_program
from oreo_jax.config import ConfigError, from_dict


def main(request: str, answer: str) -> None:
  """Reads a config, compiles what it asks for and writes what came out.

  Args:
    request: a JSON file with the values of a resolved config.
    answer: the JSON file to write; "refused" in it is the reason why the
      config cannot work.
  """
  config = from_dict(files.read_json(request))
  try:
    result = compile_program(config)
  except ConfigError as error:
    result = {"refused": str(error), "fits": False}
  files.write_json(answer, result)


if __name__ == "__main__":
  main(*sys.argv[1:])
