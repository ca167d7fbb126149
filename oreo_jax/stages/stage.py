"""What a stage is: work that leaves a record, and a command that does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from oreo_jax.config import Config
from oreo_jax.stages.workspace import Work, Workspace


class Say(Protocol):
  """Prints one message for the user; a stage says what it did with it."""

  def __call__(self, text: str, *, end: str = "\n") -> None:
    """Prints `text` and `end`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Work):
  """Work that is a command: a row of the table `stages.STAGES`.

  `oreo NAME` runs it, the usage lists it, and `--overwrite` removes what it
  leaves.

  Attributes:
    summary: one line for the usage.
    run: does the work and says what came out; a stage that is done returns at
      once.
    leaves: names in the work directory that `--overwrite` removes.
    trains: whether networks are trained, so that there are steps to profile.
    needs_devices: whether it runs on this machine's devices, in the mesh that
      the config asks for; if not, that mesh need not exist.
  """

  summary: str
  run: Callable[[Workspace, Say], None]
  leaves: Callable[[Config], tuple[str, ...]]
  trains: bool = False
  needs_devices: bool = True
