"""What a stage leaves of itself: from what it was made, and with what figures.

`begun.json` is written when a stage begins and `record.json` when it has ended,
after the results that it speaks of. Both hold the settings that the outcome
depends on and a digest of every file it was made from.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from oreo_jax import files, hosts
from oreo_jax.config import ConfigError

RECORD, BEGUN = "record.json", "begun.json"


class StageRun:
  """A stage under way; `done` writes the record that ends it."""

  def __init__(self, folder: pathlib.Path, identity: dict[str, Any]):
    """Starts the clock."""
    self._folder = folder
    self._identity = identity
    self._start = time.monotonic()

  @property
  def seconds(self) -> float:
    """Returns how long the stage has been running."""
    return round(time.monotonic() - self._start, 2)

  def done(self, **figures: Any) -> None:
    """Marks the stage as finished, with figures worth keeping.

    Call it last: what the record speaks of must be on disk before it.
    """
    record = {**self._identity, "seconds": self.seconds, **figures}
    if hosts.is_chief():
      files.write_json(self._folder / RECORD, record)
    # Other processes look for the record next.
    hosts.wait_for_all(f"{self._folder.name} is done")


def has_checkpoints(folder: pathlib.Path) -> bool:
  """Returns whether a stage under way has saved a step of training."""
  steps = folder / "checkpoints"
  return steps.is_dir() and any(p.name.isdigit() for p in steps.iterdir())


def changed_sources(
  before: Mapping[str, Any], now: Mapping[str, str]
) -> list[str]:
  """Returns the names of the files that a record was not made from."""
  made_from = before.get("made_from", {})
  names = sorted({*made_from, *now})
  return [name for name in names if made_from.get(name) != now.get(name)]


def describe(folder: str, record: Mapping[str, Any]) -> str:
  """Returns one line with the figures of a record."""
  figures: dict[str, Any] = {}
  for key, value in record.items():
    if key not in ("settings", "made_from"):
      figures |= value if isinstance(value, dict) else {key: value}
  cells = [
    f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
    for key, value in figures.items()
  ]
  return f"{folder}: " + "  ".join(cells)


def check_identity(
  before: Mapping[str, Any], now: Mapping[str, Any], place: pathlib.Path
) -> None:
  """Raises a ConfigError if what was made is not what would be made now.

  Args:
    before: what a record holds.
    now: {"settings", "made_from"} of the command under way.
    place: the stage's folder, for the message.
  """
  changed = difference(before["settings"], now["settings"])
  if changed:
    raise ConfigError(
      f"{place} was made with other settings ({', '.join(changed)}):"
      " use another --workdir, or --overwrite to do the stage again"
    )
  sources = changed_sources(before, now["made_from"])
  if sources:
    raise ConfigError(
      f"{place} was made from other files ({', '.join(sources)} changed "
      "since): use another --workdir, or --overwrite to do the stage again"
    )


def plain(values: Any) -> Any:
  """Returns the values as JSON gives them back, tuples as lists."""
  return json.loads(json.dumps(values))


def difference(
  before: Mapping[str, Any], now: Mapping[str, Any], path: str = "config"
) -> list[str]:
  """Returns the dotted names of the settings that differ."""
  changed: list[str] = []
  for key in sorted({*before, *now}):
    name = f"{path}.{key}"
    old, new = before.get(key), now.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
      changed += difference(old, new, name)
    elif old != new:
      changed.append(name)
  return changed
