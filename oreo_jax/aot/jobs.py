"""Many compilations: side by side, each in a process of its own, and cached.

A process of its own can have the devices and the compiler that a topology asks
for, which a running process cannot change, and its memory is free afterwards.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import oreo_jax
from oreo_jax import files
from oreo_jax.aot import topology
from oreo_jax.config import Config, ConfigError, to_dict
from oreo_jax.progress import Progress

# Settings of a search that one compilation does not depend on.
_NO_MATTER = (
  "search",
  "jobs",
  "tensor",
  "data",
  "grad_accum",
  "remat",
  "attention_block",
)
_PACKAGE = pathlib.Path(oreo_jax.__file__).parent


def compile_all(
  configs: Sequence[Config],
  folder: pathlib.Path,
  *,
  jobs: int = 0,
  progress: Progress,
) -> list[dict[str, Any]]:
  """Compiles a program a config, or reads what came out before.

  Args:
    configs: resolved ones; `config.aot` says for which machine.
    folder: of the cache.
    jobs: compilations at once; 0: as many as half of the cores.
    progress: counts them.

  Returns:
    The answers of `compilation.compile_program`, in the order of the configs.
    A config that cannot work has "refused" with the reason instead.
  """
  workers = jobs or max((os.cpu_count() or 2) // 2, 1)
  # Two of the same would write the same file at the same time.
  distinct = {key_of(config): config for config in configs}
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    pending = {
      key: pool.submit(_one, config, folder / f"{key}.json")
      for key, config in distinct.items()
    }
    for future in concurrent.futures.as_completed(pending.values()):
      future.result()
      progress.update()
  return [pending[key_of(config)].result() for config in configs]


def key_of(config: Config) -> str:
  """Returns the name of an answer in the cache.

  It stands for all that the answer depends on: settings, the package's code
  and the versions of the compiler.
  """
  values = to_dict(config)
  values["aot"] = {
    name: value
    for name, value in values["aot"].items()
    if name not in _NO_MATTER
  }
  versions = [_version(name) for name in ("jax", "jaxlib", "libtpu")]
  text = json.dumps([values, versions, _code()], sort_keys=True, default=str)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@functools.cache
def _code() -> str:
  """Returns a hash of the package's code."""
  total = hashlib.blake2b(digest_size=16)
  for path in sorted(_PACKAGE.rglob("*.py")):
    total.update(path.read_bytes())
  return total.hexdigest()


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ""


def _one(config: Config, path: pathlib.Path) -> dict[str, Any]:
  if path.exists():
    return files.read_json(path) | {"cached": True}
  machine = topology.parse(config.aot.topology, config.aot.num_slices)
  topology.check_compiler(machine)
  request, log = path.with_suffix(".request"), path.with_suffix(".log")
  files.write_json(request, to_dict(config))
  environment = {**os.environ, **topology.environment(machine)}
  search_path = [str(_PACKAGE.parent), environment.get("PYTHONPATH", "")]
  environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
  with log.open("w", encoding="utf-8") as stream:
    done = subprocess.run(
      [sys.executable, "-m", "oreo_jax.aot.worker", str(request), str(path)],
      env=environment,
      stdout=stream,
      stderr=stream,
      check=False,
    )
  if not path.exists():
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    raise RuntimeError(
      f"the compiling process ended with code {done.returncode} and no answer; "
      f"its last words, of {log}:\n" + "\n".join(last)
    )
  files.remove(request)
  files.remove(log)
  return files.read_json(path) | {"cached": False}


def check_answer(answer: dict[str, Any]) -> None:
  """Raises a ConfigError for a config that could not work at all."""
  if "refused" in answer:
    raise ConfigError(answer["refused"])
