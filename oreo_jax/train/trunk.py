"""The states of the frozen trunk, on disk for the length of a training.

Below the adapters of the last n layers nothing changes while a stage trains, so
what the trunk says of a sequence is worked out once, before the first step, and
read in every epoch. It is held per sequence: packing is another in each epoch,
but segments do not see each other and positions start anew in each, so that the
states of a sequence are the same in any row.

The states travel as an extra of the sequences, `forward.TRUNK`, through packing
and micro-batches like any other number of a token. Each process writes the rows
that it loads to a file of its own, and all processes read all files: the folder
has to be on a disk that they share. A file counts once its seal, written after
it, says what it holds and from what it was made.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from oreo_jax import files, hosts, models
from oreo_jax.config import HOW_IT_RUNS, ConfigError
from oreo_jax.data import (
  Group,
  Tokenized,
  add_extra,
  make_loader,
  unique_sequences,
)
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.sharding import (
  batch_sharding,
  local_rows,
  process_rows,
  shard_batch,
)
from oreo_jax.train.digests import array_digests
from oreo_jax.train.forward import TRUNK, run_trunk
from oreo_jax.train.roles import trunk_depth
from oreo_jax.train.setup import Setup

# Half the bytes of float32. A model that computes in bfloat16 loses nothing.
_DTYPE = np.dtype(jnp.bfloat16)
# Settings of a model that do not change what it says.
_NO_MATTER = (*HOW_IT_RUNS, "family", "max_positions")


def keep_trunk(
  sequences: Sequence[Group],
  base: Params,
  setup: Setup,
  *,
  mesh: Mesh,
  row_length: int,
  directory: str | pathlib.Path,
) -> list[Group]:
  """Gives every sequence the states of the trunk, from disk.

  Where the folder does not hold them, or not these, they are made first, with
  a message that says why. On several processes all of them call this.

  Args:
    sequences: what the loader packs. Those longer than a row are given back as
      they are: the loader drops them.
    base: the frozen base.
    setup: the stage's fixed part.
    mesh: the device mesh, in force while this runs.
    row_length: slots of a row.
    directory: holds the states and nothing else.

  Returns:
    The sequences with `forward.TRUNK` among their extras, bf16[L, D], mapped
    into memory: a row is read from the disk when it is packed.

    They are as they were if the stage has no layers below adapters.

  Raises:
    ConfigError: if the disk has no room, or is not shared by all processes.
  """
  depth = trunk_depth(setup)
  if not depth:
    logging.info(
      "%s: no network has frozen layers below adapters, so no states are kept",
      setup.objective.name,
    )
    return list(sequences)
  directory = pathlib.Path(directory)
  unique = unique_sequences(sequences, row_length=row_length)
  key = _key(unique, base, setup, depth)
  store = _Store(directory, list(unique.values()), setup.model.embed_dim, key)
  states, problem = store.read()
  if hosts.any_of(problem is not None):
    store.make_room(problem)
    store.write(base, setup, depth, mesh, row_length)
    states, problem = store.read()
    if hosts.any_of(problem is not None):
      raise ConfigError(
        f"config.train.keep_trunk: {directory} {problem}, just after it was "
        "written: it has to be on a disk that all processes share; move "
        "--workdir there, or set --config.train.keep_trunk=False"
      )
  return add_extra(sequences, TRUNK, dict(zip(unique, states, strict=True)))


class _Store:
  """The folder: a file of states and a seal for each share of the rows."""

  def __init__(
    self,
    directory: pathlib.Path,
    sequences: Sequence[Tokenized],
    width: int,
    key: dict[str, Any],
  ):
    self._directory = directory
    self._sequences = sequences
    self._width = width
    self._key = key
    self._lengths = [len(sequence.tokens) for sequence in sequences]

  def read(self) -> tuple[list[np.ndarray], str | None]:
    """Returns the states of the sequences, or what is wrong with the folder."""
    states: list[np.ndarray | None] = [None] * len(self._sequences)
    for seal in sorted(self._directory.glob("*.json")):
      content = seal.with_suffix(".bf16")
      try:
        said = files.read_json(seal)
        other = [k for k in self._key if said["key"].get(k) != self._key[k]]
        if other:
          return [], f"holds states made of other {' and '.join(other)}"
        lengths = [self._lengths[place] for place in said["sequences"]]
        if content.stat().st_size != self._bytes(lengths):
          return [], "has a file that is not as long as it should be"
        if files.digest(content) != said["digest"]:
          return [], "has a file that was changed after it was written"
      except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return [], "has a seal that cannot be read"
      if not lengths:
        continue
      # A plain view: slicing a memmap makes an object of its class each time.
      mapped = np.asarray(np.memmap(content, _DTYPE, "r"))
      tokens = mapped.reshape(-1, self._width)
      ends = np.cumsum(lengths)
      for place, end in zip(said["sequences"], ends, strict=True):
        states[place] = tokens[end - self._lengths[place] : end]
    complete = [own for own in states if own is not None]
    if len(complete) < len(states):
      return [], "does not hold the states of all sequences"
    return complete, None

  def make_room(self, problem: str | None) -> None:
    """Empties the folder; says how much is needed, and raises if too much."""
    if hosts.is_chief():
      if any(self._directory.glob("*")):
        problem = problem or "was refused by another process"
        logging.warning("%s %s: it is made again", self._directory, problem)
      files.remove(self._directory)
    hosts.wait_for_all("the folder of the trunk is empty")
    self._directory.mkdir(parents=True, exist_ok=True)
    needed = self._bytes(self._lengths)
    free = shutil.disk_usage(self._directory).free
    tokens = sum(self._lengths)
    size = (
      f"the trunk's states of {len(self._sequences)} sequences are {tokens} "
      f"tokens x {self._width} x {_DTYPE.itemsize} bytes = {needed / 1e9:.3g} "
      f"GB; {free / 1e9:.3g} GB are free in {self._directory}"
    )
    if hosts.any_of(needed > free):
      raise ConfigError(
        f"config.train.keep_trunk: {size}; make room, move --workdir, or set "
        "--config.train.keep_trunk=False"
      )
    logging.info("%s", size)

  def write(
    self,
    base: Params,
    setup: Setup,
    depth: int,
    mesh: Mesh,
    row_length: int,
  ) -> None:
    """Runs the trunk over all sequences; writes this process's share."""
    index, count = process_rows(mesh)
    path = self._directory / f"states-{index}-of-{count}.bf16"
    computed = self._run(base, setup, depth, mesh, row_length)
    if any(
      process_rows(mesh, other)[0] == index
      for other in range(jax.process_index())
    ):
      # Another process has the same rows and writes them; this one only takes
      # part in computing them.
      collections.deque(computed, maxlen=0)
    else:
      order: list[int] = []
      with files.whole_file(path) as partial, partial.open("wb") as stream:
        for place, states in computed:
          # Extras are aligned on the token that is predicted: the first token
          # of a sequence has none before it that could have said anything.
          stream.write(np.zeros((1, self._width), _DTYPE).tobytes())
          stream.write(states.tobytes())
          order.append(place)
      seal = {
        "key": self._key,
        "sequences": order,
        "digest": files.digest(path),
      }
      files.write_json(path.with_suffix(".json"), seal)
    hosts.wait_for_all("the states of the trunk are written")

  def _run(
    self,
    base: Params,
    setup: Setup,
    depth: int,
    mesh: Mesh,
    row_length: int,
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (place, states bf16[L - 1, D]) of this process's sequences."""
    index, count = process_rows(mesh)
    loader = make_loader(
      self._sequences,
      batch_size=setup.stage.batch_size // setup.stage.grad_accum,
      row_length=row_length,
      process_index=index,
      process_count=count,
      shuffle=False,
    )
    rows = batch_sharding(mesh)
    run = jax.jit(
      lambda base, batch: run_trunk(base, batch, setup, depth).astype(_DTYPE),
      in_shardings=(None, rows),
      out_shardings=rows,
    )
    with Progress(
      loader.num_steps, "trunk", enabled=hosts.is_chief()
    ) as progress:
      for step in range(loader.num_steps):
        batch = loader.batch(step)
        states = local_rows(run(base, shard_batch(batch, mesh)), mesh)
        for row, places in enumerate(loader.sequence_indices(step)):
          for segment, place in enumerate(places, start=1):
            if place >= 0:
              yield int(place), states[row][batch.segment_ids[row] == segment]
        progress.update()

  def _bytes(self, lengths: Sequence[int]) -> int:
    return sum(lengths) * self._width * _DTYPE.itemsize


def _key(
  unique: dict[bytes, Tokenized], base: Params, setup: Setup, depth: int
) -> dict[str, Any]:
  """Returns what the states depend on, by a name for messages."""
  below = {"embedding": base["embedding"]}
  weights = array_digests(below)
  for path, leaf in jax.tree_util.tree_leaves_with_path(base["layers"]):
    # One leaf at a time, so that no second copy of the trunk is ever there.
    weights |= array_digests({jax.tree_util.keystr(path): leaf[:depth]})
  tokens = hashlib.blake2b(digest_size=16)
  for name in unique:
    tokens.update(len(name).to_bytes(8, "little") + name)
  settings = dataclasses.asdict(models.without_adapters(setup.model))
  for setting in _NO_MATTER:
    del settings[setting]
  return {
    "layers": depth,
    "settings": {k: repr(v) for k, v in sorted(settings.items())},
    "weights": weights,
    "tokens": tokens.hexdigest(),
  }
