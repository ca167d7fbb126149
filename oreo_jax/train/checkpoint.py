"""Checkpoints: Orbax behind one small class, and a check of every bit.

A tree is saved with a JSON record beside it and restored straight into the
shards of any mesh, the one it was saved on or another. Orbax writes to a
temporary name and renames: a save that is cut off leaves the older ones.

Storage and memory lose bits, and Orbax restores what it reads. So the digest
of every array is saved too (see `digests`) and compared with what was
restored; a checkpoint that does not match is never used.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from oreo_jax import files, hosts
from oreo_jax.train.digests import array_digests, kind_of


class CheckpointError(ValueError):
  """A checkpoint that is missing, damaged or of another model."""


class _DamagedError(CheckpointError):
  """This checkpoint is not what was saved; an older one may be."""


class Checkpoints:
  """The numbered checkpoints of one directory; a context manager."""

  def __init__(self, directory: str | pathlib.Path, *, keep: int = 2):
    """Opens (or makes) the directory; the newest `keep` are kept."""
    self.directory = pathlib.Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep or None)
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, None without one.

    Only a restore shows whether it is good.
    """
    return self._manager.latest_step()

  def save(
    self, step: int, tree: Any, record: dict | None = None, *, wait: bool = True
  ) -> None:
    """Saves a tree of arrays and a JSON record under a step.

    Args:
      step: number of the checkpoint; an existing one is kept as it is.
      tree: arrays, sharded or not.
      record: what a reader needs besides, plain JSON.
      wait: return when it is on disk; otherwise the writing goes on behind
        the next steps (the arrays are copied before this returns).
    """
    if step in self._manager.all_steps():
      return
    contents: dict[str, Any] = {
      "record": record or {},
      "arrays": array_digests(tree),
    }
    contents["digest"] = _digest_of(contents)
    args = ocp.args.Composite(
      tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(contents)
    )
    self._manager.save(step, args=args)
    if wait:
      self._manager.wait_until_finished()

  def record(self, step: int | None = None) -> dict:
    """Returns the JSON record of a checkpoint (the newest by default).

    Raises:
      CheckpointError: if there is none, or none that is good.
    """
    if step is not None:
      return self._read_contents(step)["record"]
    return self._newest_good(self._read_contents)["record"]

  def restore(self, abstract: Any, step: int | None = None) -> Any:
    """Reads a checkpoint into the shapes and shardings of `abstract`.

    By default that is the newest good one. Damaged ones that are newer are
    renamed to `<step>.damaged`, with a warning: a run goes on from the good
    one and writes those steps again.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct`s, with shardings where the
        arrays should lie.
      step: which one; it alone is tried.

    Raises:
      CheckpointError: if there is none, none that is good, or it is of
        another model.
    """
    if step is not None:
      return self._read_tree(step, abstract)
    return self._newest_good(lambda step: self._read_tree(step, abstract))

  def _newest_good(self, read: Callable[[int], Any]) -> Any:
    """Returns what `read` makes of the newest step that is not damaged."""
    damaged: dict[int, _DamagedError] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        outcome = read(step)
      except _DamagedError as error:
        damaged[step] = error
        continue
      for bad, error in damaged.items():
        self._set_aside(bad, error, step)
      return outcome
    if damaged:
      # They stay where they are: the run must not start afresh unasked.
      raise CheckpointError(
        f"no checkpoint in {self.directory} is good: "
        + "; ".join(str(error) for error in damaged.values())
        + f". Remove {self.directory} to do the stage again"
      ) from next(iter(damaged.values()))
    raise CheckpointError(
      f"{self.directory} holds no checkpoint: run the stage that writes it"
    )

  def _set_aside(self, step: int, error: _DamagedError, good: int) -> None:
    if hosts.is_chief():
      aside = files.set_aside(self.directory / str(step), "damaged")
      logging.warning("%s; it is now %s, step %d is used", error, aside, good)
    hosts.wait_for_all(f"checkpoint {step} is set aside")
    self._manager.reload()

  def _read_contents(self, step: int) -> dict[str, Any]:
    """Returns {"record": ..., "arrays": ...}, checked."""
    contents = self._orbax(step, "record", ocp.args.JsonRestore())
    good = isinstance(contents, dict)
    good = good and contents.get("digest") == _digest_of(contents)
    if hosts.any_of(not good):
      raise self._damaged(
        step, "its record does not match its digest, or it has none"
      )
    return contents

  def _read_tree(self, step: int, abstract: Any) -> Any:
    saved = self._read_contents(step)["arrays"]
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    wanted = {
      jax.tree_util.keystr(path): kind_of(leaf) for path, leaf in leaves
    }
    kinds = {name: digest.split()[0] for name, digest in saved.items()}
    for name in sorted({*kinds, *wanted}):
      if kinds.get(name) != wanted.get(name):
        raise CheckpointError(
          f"checkpoint {self.directory}/{step} is of another model: {name} is "
          f"{kinds.get(name, 'absent')} there and {wanted.get(name, 'absent')}"
          " here; use the settings it was made with, or another --workdir"
        )
    tree = self._orbax(step, "tree", ocp.args.StandardRestore(abstract))
    restored = array_digests(tree)
    changed = [name for name in saved if saved[name] != restored.get(name)]
    if changed:
      raise self._damaged(
        step, f"{', '.join(changed)} is not what was saved (other bits)"
      )
    return tree

  def _orbax(self, step: int, item: str, args: Any) -> Any:
    """Restores one item; every process fails if one of them does."""
    reason = outcome = cause = None
    try:
      outcome = self._manager.restore(
        step, args=ocp.args.Composite(**{item: args})
      )[item]
    except Exception as error:
      # Orbax raises many kinds; to the user they all mean this.
      lines = str(error).strip().splitlines()
      reason, cause = lines[0] if lines else type(error).__name__, error
    if hosts.any_of(reason is not None):
      reason = reason or "another process could not read it"
      raise self._damaged(step, reason) from cause
    return outcome

  def _damaged(self, step: int, reason: str) -> _DamagedError:
    return _DamagedError(
      f"checkpoint {self.directory}/{step} cannot be read (damaged, or of an "
      f"earlier version): {reason}"
    )

  def close(self) -> None:
    """Waits for the writing to end."""
    self._manager.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *unused_error: object) -> None:
    self.close()


def abstract_like(tree: Any, shardings: Any) -> Any:
  """Returns the shapes and dtypes of `tree` with these shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def _digest_of(contents: dict[str, Any]) -> str:
  """Returns a hash of what is saved beside the tree, as JSON."""
  plain = {name: contents.get(name) for name in ("record", "arrays")}
  text = json.dumps(plain, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
