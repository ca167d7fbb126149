"""Compiled programs are kept between runs.

The first call of a stage is mostly compilation, and the next run of the same
stage compiles the same programs. JAX keeps them in a folder when it is told
which one.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform

import jax

_MOST_BYTES = 4 << 30


def cache_folder() -> pathlib.Path:
  """Returns the folder of this user's programs for this kind of machine.

  A program for CPUs is made for the instructions of one kind of CPU, and a home
  folder may be shared by machines that differ, so their features are part of
  the name.
  """
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  features = platform.processor() + platform.machine()
  cpus = pathlib.Path("/proc/cpuinfo")
  if cpus.exists():
    lines = cpus.read_text().splitlines()
    features += "".join(
      sorted({x for x in lines if x.startswith(("flags", "Features", "model"))})
    )
  kind = hashlib.sha256(features.encode()).hexdigest()[:12]
  return pathlib.Path(home) / "oreo_jax" / f"{platform.machine()}-{kind}"


def keep_programs() -> None:
  """Has JAX keep what takes a second or more to compile, up to 4 GiB.

  A folder that the user has named (JAX_COMPILATION_CACHE_DIR) is taken instead,
  and JAX_ENABLE_COMPILATION_CACHE=false turns it off, as in all uses of JAX.
  """
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  folder = cache_folder()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    # A home that cannot be written to costs time, nothing else.
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
