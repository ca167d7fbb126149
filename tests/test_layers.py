"""Imports inside the package only go down; see docs/architecture.md."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "oreo_jax"

# A room is a module or a folder right under the package. A new one needs a
# place here, so that the table stays the map of the house.
LAYERS = {
  "allocator": 0,
  "chips": 0,
  "compilation": 0,
  "files": 0,
  "hosts": 0,
  "settings": 0,
  "watch": 0,
  "config": 1,
  "memory": 1,
  "sharding": 1,
  "progress": 1,
  "losses": 2,
  "models": 2,
  "data": 2,
  "tasks": 2,
  "metrics": 2,
  "analysis": 2,
  "train": 3,
  "decode": 4,
  "scoring": 5,
  "aot": 6,
  "rollout": 6,
  "report": 6,
  "stages": 7,
  "cli": 8,
  "__main__": 8,
}

# Imported by one room only.
RESERVED = {
  "flax": "models",
  "absl.flags": "cli",
  "ml_collections.config_flags": "cli",
}

# Other JAX projects import the losses: nothing else may come along.
LOSSES_MAY_IMPORT = {"jax", "numpy", *sys.stdlib_module_names}


def module_names(root):
  """Dotted name of every module under `root`, mapped to its file."""
  names = {}
  for path in sorted(root.rglob("*.py")):
    parts = (root.name, *path.relative_to(root).with_suffix("").parts)
    names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return names


def imported_names(name, path):
  """Yields (line, candidates) for every import, also inside functions.

  `from a import b` may name the module `a.b` or a member of `a`: both are
  candidates, the longer one first.
  """
  package = name.split(".")
  if path.name != "__init__.py":
    package = package[:-1]
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, (alias.name,)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        above = package[: len(package) - node.level + 1]
        base = ".".join([*above, base] if base else above)
      for alias in node.names:
        yield node.lineno, (f"{base}.{alias.name}", base)


def is_inside(name, package):
  return name == package or name.startswith(package + ".")


def violations(root):
  """One line for every import of the tree that breaks a rule."""
  modules = module_names(root)
  found = []
  module_graph = {name: set() for name in modules}
  room_graph = {}

  def room_of(name):
    return name.split(".")[1] if "." in name else None

  for room in sorted({room_of(name) for name in modules} - {None}):
    if room not in LAYERS:
      found.append(f"{root.name}/{room}: not in the table of layers")

  for name, path in modules.items():
    room = room_of(name)
    for line, candidates in imported_names(name, path):
      where = f"{path.relative_to(root.parent)}:{line}"
      for package, owner in RESERVED.items():
        if room != owner and any(is_inside(c, package) for c in candidates):
          found.append(f"{where}: only {owner} may import {package}")
      if not is_inside(candidates[-1], root.name):
        top = candidates[-1].split(".")[0]
        if room == "losses" and top not in LOSSES_MAY_IMPORT:
          found.append(f"{where}: losses import only jax and numpy, not {top}")
        continue

      target = next((c for c in candidates if c in modules), None)
      if target is None:
        found.append(f"{where}: no module {candidates[-1]}")
        continue
      if target == root.name and room is not None:
        continue  # the version; the root imports nothing, so no circle
      if room is None:
        found.append(f"{where}: the package's own __init__ imports nothing")
        continue
      module_graph[name].add(target)
      other = room_of(target)
      if other == room:
        continue
      room_graph.setdefault(room, set()).add(other)
      if room == "losses":
        found.append(f"{where}: losses import only losses, not {other}")
      elif LAYERS.get(other, 0) > LAYERS.get(room, max(LAYERS.values())):
        found.append(f"{where}: {room} imports {other} from a layer above")

  for what, graph in (("modules", module_graph), ("rooms", room_graph)):
    try:
      graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
      circle = " -> ".join(reversed(error.args[1]))
      found.append(f"{root.name}: {what} import in a circle: {circle}")
  return found


def test_package_follows_the_layers():
  assert violations(PACKAGE) == []


@pytest.fixture
def make_tree(tmp_path):
  def make(**files):
    root = tmp_path / "oreo_jax"
    for name, text in {"__init__": "", **files}.items():
      path = root / f"{name}.py"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    return root

  return make


def test_a_good_tree_passes(make_tree):
  root = make_tree(
    **{
      "config": "import dataclasses",
      "losses/__init__": "from oreo_jax.losses.oreo import oreo_loss",
      "losses/oreo": "import jax\nfrom . import sums\noreo_loss = 1",
      "losses/sums": "import numpy as np",
      "models/__init__": "from flax import nnx",
      "train/__init__": "from .step import f",
      "train/step": "from oreo_jax import losses\nfrom ..config import x",
      "stages": "from oreo_jax import __version__, decode",
      "decode": "import oreo_jax.config",
      "cli": "from absl import app, flags\nimport oreo_jax.stages",
    }
  )
  assert violations(root) == []


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"config": "import oreo_jax.cli", "cli": ""}, "config imports cli"),
    # Inside a function, and relative.
    (
      {"train/__init__": "def f():\n  from ..decode import g", "decode": "g=1"},
      "train/__init__.py:2: train imports decode from a layer above",
    ),
    (
      {"data/a": "from . import b", "data/b": "import oreo_jax.data.a"},
      "modules import in a circle",
    ),
    # A circle of rooms of one layer that no two modules close.
    (
      {
        "data/a": "import oreo_jax.tasks.c",
        "data/b": "",
        "tasks/c": "",
        "tasks/d": "from oreo_jax.data import b",
        "tasks/__init__": "",
        "data/__init__": "",
      },
      "rooms import in a circle",
    ),
    # A member taken from the package that imports this very module.
    (
      {
        "losses/__init__": "from .oreo import loss",
        "losses/oreo": "from oreo_jax.losses import loss",
      },
      "modules import in a circle",
    ),
    ({"losses": "import oreo_jax.config", "config": ""}, "only losses"),
    ({"losses": "import optax"}, "only jax and numpy, not optax"),
    ({"train": "from flax import nnx"}, "only models may import flax"),
    ({"config": "from absl import flags"}, "only cli may import absl.flags"),
    ({"config": "import absl.flags as f"}, "only cli may import absl.flags"),
    ({"attic": ""}, "attic: not in the table"),
    ({"config": "import oreo_jax.attic"}, "no module oreo_jax.attic"),
    ({"__init__": "import oreo_jax.config", "config": ""}, "imports nothing"),
  ],
)
def test_a_bad_tree_fails(make_tree, files, message):
  found = violations(make_tree(**files))
  assert any(message in line for line in found), found
