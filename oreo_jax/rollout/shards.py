"""Trajectories that survive a kill: shards of JSON lines.

Trajectories are written a shard at a time, while others are still being made. A
shard takes its name when it is whole, so what is in the folder is good, and a
run that was killed goes on with what is not there.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from oreo_jax import data, hosts
from oreo_jax.settings import ConfigError

TRAJECTORIES_A_SHARD = 1024


class Shards:
  """The trajectories of a collection, some of them there from an earlier run.

  On several hosts, which share the folder, every process makes one and adds the
  same trajectories; the chief writes.

  Attributes:
    done: the trajectories that are there, by their place.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    names: Sequence[str],
    *,
    a_shard: int = TRAJECTORIES_A_SHARD,
  ):
    """Reads what an earlier run left.

    Args:
      folder: of the shards 00000.jsonl, 00001.jsonl, ...
      names: ids of all trajectories of the collection, in their order.
      a_shard: at most so many are lost by a kill.

    Raises:
      ConfigError: if the folder holds a trajectory that was not asked for, or
        names are not unique.
    """
    self._places = {name: place for place, name in enumerate(names)}
    if len(self._places) < len(names):
      raise ConfigError(
        f"problems: expected ids that differ, got {len(names)} attempts with "
        f"{len(self._places)} ids"
      )
    self._folder, self._a_shard = folder, a_shard
    self._waiting: list[data.Trajectory] = []
    shards = sorted(folder.glob("*.jsonl")) if folder.exists() else []
    self._count = len(shards)
    self.done: dict[int, data.Trajectory] = {}
    for shard in shards:
      for trajectory in data.load_trajectories(shard):
        if trajectory.id not in self._places:
          raise ConfigError(
            f"{trajectory.source}: expected answers to the problems of this "
            f"run, got {trajectory.id!r}; remove {folder} to collect anew, or "
            "use another --workdir"
          )
        self.done[self._places[trajectory.id]] = trajectory
    # All have read the folder before anyone writes to it.
    hosts.wait_for_all("the answers of an earlier run are read")

  def add(self, trajectory: data.Trajectory) -> None:
    """Takes a trajectory, which is written with the rest of its shard."""
    self.done[self._places[trajectory.id]] = trajectory
    self._waiting.append(trajectory)
    if len(self._waiting) >= self._a_shard:
      self.flush()

  def flush(self) -> None:
    """Writes what is waiting."""
    if self._waiting:
      if hosts.is_chief():
        self._folder.mkdir(parents=True, exist_ok=True)
        data.save_trajectories(
          self._folder / f"{self._count:05}.jsonl", self._waiting
        )
      self._count += 1
    self._waiting = []

  def in_order(self) -> list[data.Trajectory]:
    """Returns all trajectories that are there, by their places."""
    return [self.done[place] for place in sorted(self.done)]
