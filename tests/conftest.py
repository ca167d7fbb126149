"""Eight simulated CPU devices, strict dtype and rank promotion everywhere."""

import importlib.metadata
import os
import pathlib

# Read once, when the backend starts: set before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The commands of the tests keep no programs in the user's folder, nor take any.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
_FLAGS = ["--xla_force_host_platform_device_count=8"]
# XLA's older code generator for fusions computes the same and compiles a step
# in half the time. An XLA that does not know a flag ends the process, so that
# it is only asked of the releases that were tried.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Their tests compile much and compute little.
QUICKLY_COMPILED = (
  "decode",
  "docs",
  "losses",
  "models",
  "rollout",
  "stages",
  "train",
)

# A process takes a whole file. One that comes last and takes minutes leaves the
# other processes idle, so that the longest ones come first, longest before all.
LONG_FILES = (
  "stages/test_meshes.py",
  "launch/test_slurm.py",
  "stages/test_iterate.py",
  "stages/test_compare.py",
  "test_cli.py",
  "train/test_step.py",
  "train/test_options.py",
  "train/test_keep_trunk.py",
  "decode/test_beam.py",
  "losses/test_invariances.py",
  "decode/test_generate.py",
  "aot/test_compilation.py",
)


def pytest_collection_modifyitems(items):
  """Moves the tests of the longest files to the front."""
  tests = pathlib.Path(__file__).parent
  places = {tests / name: place for place, name in enumerate(LONG_FILES)}
  items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(request):
  room = request.path.relative_to(pathlib.Path(__file__).parent).parts[0]
  quickly = room in QUICKLY_COMPILED
  jax.config.update("jax_disable_most_optimizations", quickly)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
