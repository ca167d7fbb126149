"""Checkpoints: Orbax behind one small class.

A tree is saved with a JSON record beside it and restored straight into the
shards of any mesh, the one it was saved on or another. Orbax writes to a
temporary name and renames: a save that is cut off leaves the older ones.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp


class CheckpointError(ValueError):
  """A checkpoint that is missing, damaged or of another model."""


class Checkpoints:
  """The numbered checkpoints of one directory; a context manager."""

  def __init__(self, directory: str | pathlib.Path, *, keep: int = 2):
    """Opens (or makes) the directory; the newest `keep` are kept."""
    self.directory = pathlib.Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep or None)
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def latest_step(self) -> int | None:
    """Returns the step of the newest whole checkpoint, None without one."""
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
    args = ocp.args.Composite(
      tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record or {})
    )
    self._manager.save(step, args=args)
    if wait:
      self._manager.wait_until_finished()

  def record(self, step: int | None = None) -> dict:
    """Returns the JSON record of a checkpoint (the newest by default)."""
    found = self._restore(step, record=ocp.args.JsonRestore())
    return found["record"]

  def restore(self, abstract: Any, step: int | None = None) -> Any:
    """Reads a checkpoint into the shapes and shardings of `abstract`.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct`s, with shardings where the
        arrays should lie.
      step: which one; the newest by default.

    Raises:
      CheckpointError: if there is none, or it does not fit or is damaged.
    """
    found = self._restore(step, tree=ocp.args.StandardRestore(abstract))
    return found["tree"]

  def _restore(self, step: int | None, **args: Any) -> Any:
    step = self.latest_step() if step is None else step
    if step is None:
      raise CheckpointError(
        f"{self.directory} holds no checkpoint: run the stage that writes it"
      )
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:
      # Orbax raises many kinds; to the user they all mean this.
      reason = str(error).strip().splitlines()
      raise CheckpointError(
        f"checkpoint {self.directory}/{step} cannot be read (damaged, or of "
        f"another model; remove it to go on from an older one): "
        f"{reason[0] if reason else type(error).__name__}"
      ) from error

  def close(self) -> None:
    """Waits for the writing to end."""
    self._manager.close()

  def __enter__(self) -> "Checkpoints":
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
