"""Files of trajectories: JSON lines, Parquet, Arrow, `datasets` directories.

What a row may hold is said in `rows`. Bad rows raise one error each that names
the file, the line and the way out; or they are dropped, counted and logged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from oreo_jax import files
from oreo_jax.data import output_rows
from oreo_jax.data import rows as rows_lib
from oreo_jax.data.errors import Parsed, TrajectoryError, keep_good
from oreo_jax.data.records import read_records
from oreo_jax.data.schema import (
  Pair,
  Trajectory,
  Turn,
  problem_key,
  stable_hash,
)

__all__ = [
  "Pair",
  "Trajectory",
  "Turn",
  "load_pairs",
  "load_trajectories",
  "save_pairs",
  "save_trajectories",
  "split_by_problem",
]

# A path, or rows in memory such as a `datasets.Dataset`.
Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
TRL_TYPES = ("prompt_completion", "unpaired_preference")


def load_trajectories(
  source: Source, *, on_error: str = "raise"
) -> list[Trajectory]:
  """Reads trajectories.

  Args:
    source: a file of JSON lines (`.jsonl`, `.json`), a `.parquet` or `.arrow`
      file, a directory of such files or one that `datasets` saved, or rows in
      memory such as a `datasets.Dataset`.
    on_error: "raise" stops at the first bad row; "skip" drops bad rows, counts
      them by kind and logs the counts.

  Returns:
    The trajectories, in order; a row of TRL's preference type gives two.

  Raises:
    TrajectoryError: a row is bad (the subclass says what is wrong with it).
    ValueError: there is no such file, or it holds no usable row.
  """
  return _load(source, rows_lib.parse_row, on_error)


def load_pairs(source: Source, *, on_error: str = "raise") -> list[Pair]:
  """Reads rows of TRL's preference type; see `load_trajectories`."""
  return _load(
    source, lambda row, place: [rows_lib.parse_pair(row, place)], on_error
  )


def save_trajectories(
  path: str | os.PathLike[str],
  trajectories: Iterable[Trajectory],
  *,
  trl_type: str | None = None,
) -> None:
  """Writes trajectories as JSON lines, under a temporary name until whole.

  Args:
    path: the file.
    trajectories: to write.
    trl_type: "prompt_completion" or "unpaired_preference" writes TRL's rows
      instead of this project's. They lose rewards other than right and wrong.
  """
  if trl_type is None:
    rows = map(output_rows.trajectory_row, trajectories)
  elif trl_type == "prompt_completion":
    rows = map(output_rows.prompt_completion_row, trajectories)
  elif trl_type == "unpaired_preference":
    rows = map(output_rows.unpaired_row, trajectories)
  else:
    raise ValueError(f"trl_type is {trl_type!r}, expected one of {TRL_TYPES}")
  _write_jsonl(path, rows)


def save_pairs(path: str | os.PathLike[str], pairs: Iterable[Pair]) -> None:
  """Writes pairs as JSON lines of TRL's preference type."""
  _write_jsonl(path, map(output_rows.preference_row, pairs))


def split_by_problem(
  trajectories: Sequence[Trajectory], *, fraction: float, seed: int = 0
) -> tuple[list[Trajectory], list[Trajectory]]:
  """Splits off the attempts at about `fraction` of the problems.

  Whether a problem is held out depends on its name and the seed alone, so that
  more data never moves a problem from one side to the other. White space does
  not count: a problem and the same one with a blank at its end stay together.

  Args:
    trajectories: to split.
    fraction: share of the problems held out, in [0, 1].
    seed: chooses another split.

  Returns:
    The remaining and the held-out trajectories, each in the order given.
  """
  if not 0.0 <= fraction <= 1.0:
    raise ValueError(
      f"fraction is {fraction}, expected a number in [0, 1]"
      " (--config.data.held_out)"
    )
  held = {
    problem: stable_hash(seed, problem_key(problem)) < fraction * 2.0**64
    for problem in {t.problem for t in trajectories}
  }
  remaining = [t for t in trajectories if not held[t.problem]]
  return remaining, [t for t in trajectories if held[t.problem]]


def _load(
  source: Source,
  parse: Callable[[Any, str], Sequence[Parsed]],
  on_error: str,
) -> list[Parsed]:
  """Reads and parses rows, and complains if none is left."""

  def parse_placed(placed: tuple[str, Any]) -> Sequence[Parsed]:
    place, row = placed
    if isinstance(row, TrajectoryError):
      raise row
    return parse(row, place)

  loaded = keep_good(_placed_rows(source), parse_placed, on_error=on_error)
  if not loaded:
    name = source if isinstance(source, str | os.PathLike) else "the data"
    raise ValueError(f"{name} holds no usable row; set --config.data.path")
  return loaded


def _placed_rows(source: Source) -> Iterator[tuple[str, Any]]:
  """Yields (place, row or error) for every row of a source."""
  if not isinstance(source, str | os.PathLike):
    for number, row in enumerate(source, start=1):
      yield f"row {number}", row
    return
  yield from read_records(source)


def _write_jsonl(
  path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]
) -> None:
  """Writes one JSON object a line; the file appears only when complete."""
  with files.whole_file(path) as partial:
    with partial.open("w", encoding="utf-8") as file:
      for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
