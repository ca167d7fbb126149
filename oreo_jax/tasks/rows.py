"""Rows of a question data set: their splits and their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from oreo_jax.data.errors import TrajectoryError
from oreo_jax.data.records import read_splits
from oreo_jax.tasks.splits import text_hash, text_split
from oreo_jax.tasks.task import SPLITS


class Row(NamedTuple):
  """A row and where it stands, for errors."""

  fields: dict[str, Any]
  place: str


def read_rows(path: str, subset: str | None = None) -> dict[str, list[Row]]:
  """Reads all rows of a data set, by split (see `records.read_splits`).

  Raises:
    ValueError: names the file and the line.
  """
  return {
    split: [_good_row(place, row) for place, row in records]
    for split, records in read_splits(path, subset).items()
  }


def split_rows(
  rows: dict[str, list[Row]], key: Callable[[Row], str]
) -> dict[str, list[Row]]:
  """Sorts rows into disjoint `train`, `validation` and `test`.

  Rows without splits, or with `train` only, are split 8:1:1 by a hash of their
  key; a missing validation split is a twentieth of train. Of rows with the same
  key (but for white space) the first alone stays, test rows before all others.

  Args:
    rows: what `read_rows` returned.
    key: the text that makes two rows the same problem.
  """
  split = {name: list(rows.get(name, ())) for name in SPLITS}
  split["train"] += rows.get("all", ())
  if not split["test"] and not split["validation"]:
    pool, split["train"] = split["train"], []
    for row in pool:
      split[text_split(key(row))].append(row)
  elif not split["validation"]:
    pool, split["train"] = split["train"], []
    for row in pool:
      held_out = text_hash(key(row)) % 20 == 0
      split["validation" if held_out else "train"].append(row)
  seen: set[int] = set()
  return {
    name: list(_first_of_each(split[name], key, seen))
    for name in reversed(SPLITS)
  }


def field(row: Row, *names: str) -> str:
  """Returns the first of the fields that the row has, as text.

  Raises:
    ValueError: if it has none of them, or it is neither text nor a number.
  """
  for name in names:
    value = row.fields.get(name)
    if isinstance(value, str) and value.strip():
      return value
    if isinstance(value, int | float) and not isinstance(value, bool):
      return str(value)
  raise ValueError(
    f"{row.place}: needs a text in {' or '.join(map(repr, names))}; "
    f"the row has {', '.join(map(repr, row.fields)) or 'no fields'}"
  )


def _good_row(place: str, row: Mapping[str, Any] | TrajectoryError) -> Row:
  if isinstance(row, TrajectoryError):
    # Its text advises a flag that only trajectories have.
    raise ValueError(f"{place}: {row.problem}; {row.fix}") from row
  return Row(dict(row), place)


def _first_of_each(
  rows: Iterable[Row], key: Callable[[Row], str], seen: set[int]
) -> Iterator[Row]:
  """Yields the rows whose problem is not in `seen`, and adds it there."""
  for row in rows:
    code = text_hash(key(row))
    if code not in seen:
      seen.add(code)
      yield row
