"""Packing: sequences of tokens into rows of one fixed shape.

A sequence of L tokens fills L-1 slots of a row: slot t holds the input x[t]
and everything said about its target x[t+1]. Several sequences share a row;
`segment_ids` keeps them apart, so that no loss, position or attention crosses
from one into another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from oreo_jax.data.tokens import Tokenized

# Sequences are packed in windows of this many, longest first within a window:
# full rows, while which sequences meet in a row stays random.
WINDOW = 512

Array = TypeVar("Array")


class Batch(NamedTuple, Generic[Array]):
  """Rows of packed sequences, aligned on the predicted token, shape [B, T].

  The arrays are NumPy's where rows are packed, and JAX's inside a step.
  """

  tokens: Array  # i32: inputs x[0..L-2] of every sequence of the row
  targets: Array  # i32: x[1..L-1], the token predicted at that index
  positions: Array  # i32: 0, 1, .. within each sequence
  segment_ids: Array  # i32: 0 padding, k>0 the k-th sequence of the row
  action_mask: Array  # bool: the target was produced by the policy
  decision_mask: Array  # bool: an action starts at the target
  rewards: Array  # f32: reward a token; terminal on the last action
  # More arrays of the targets by name, zero in the padding.
  extras: dict[str, Array] = {}


class RowPlan(NamedTuple):
  """Which sequences share a row: row r holds members[starts[r]:starts[r+1]]."""

  members: np.ndarray  # i64[N]
  starts: np.ndarray  # i64[rows + 1]

  @property
  def num_rows(self) -> int:
    """Number of rows."""
    return len(self.starts) - 1

  def row(self, index: int) -> np.ndarray:
    """Returns the sequences of one row, in order."""
    return self.members[self.starts[index] : self.starts[index + 1]]

  def permute(self, order: np.ndarray) -> RowPlan:
    """Returns the plan with its rows in another order."""
    counts = np.diff(self.starts)[order]
    starts = np.concatenate([[0], np.cumsum(counts)])
    # Index of every member in the old layout: its row's old start plus its
    # place in the row.
    places = np.arange(len(self.members)) - np.repeat(starts[:-1], counts)
    old = np.repeat(self.starts[:-1][order], counts) + places
    return RowPlan(self.members[old], starts)


def plan_rows(
  slots: np.ndarray,
  order: np.ndarray,
  *,
  row_length: int,
  max_members: int | None = None,
  window: int = WINDOW,
) -> RowPlan:
  """Assigns every sequence of `order` to one row.

  Best fit, longest first within windows of `window` sequences; rows with room
  left stay open for the next windows.

  Args:
    slots: i[N], slots each sequence takes, in [1, row_length].
    order: i[M], the sequences to place, in the order they arrive.
    row_length: slots of a row.
    max_members: at most so many sequences a row.
    window: sequences sorted by length at a time.

  Returns:
    The plan; rows in the order they were opened.
  """
  limit = len(order) if max_members is None else max_members
  lengths = np.asarray(slots)[order]
  rows = np.empty(len(order), np.int64)  # row of the i-th arrival
  counts: list[int] = []  # sequences in each row
  # Open rows by the room they have left. Bit r of `rooms` says that some open
  # row has room r: the tightest row that takes a sequence then needs no search
  # over rows, only the lowest bit that is set from the sequence's size on.
  open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]
  rooms = 0
  for start in range(0, len(order), window):
    sizes = lengths[start : start + window]
    arrivals = np.argsort(-sizes, kind="stable")
    for arrival, size in zip(
      arrivals.tolist(), sizes[arrivals].tolist(), strict=True
    ):
      fitting = rooms >> size  # bit k: there is a row with room size + k
      if fitting:
        # x & -x leaves the lowest bit of x that is set.
        room = size + (fitting & -fitting).bit_length() - 1
        row = open_rows[room].pop()
        if not open_rows[room]:
          rooms ^= 1 << room
        counts[row] += 1
      else:
        room = row_length
        row = len(counts)
        counts.append(1)
      rows[start + arrival] = row
      # A row that is full, or holds as many sequences as it may, is not opened
      # again.
      left = room - size
      if left and counts[row] < limit:
        if not open_rows[left]:
          rooms |= 1 << left
        open_rows[left].append(row)
  # A stable sort by row keeps the order of arrival within each row.
  members = np.asarray(order, np.int64)[np.argsort(rows, kind="stable")]
  return RowPlan(members, np.concatenate([[0], np.cumsum(counts, dtype=int)]))


def check_extras(sequences: Iterable[Tokenized]) -> dict[str, np.ndarray]:
  """Returns the extras that all sequences have, as arrays without a token.

  Args:
    sequences: of one batch, or of all batches of one loader.

  Raises:
    ValueError: two sequences have extras of other names, or one of another
      dtype or length.
  """
  kinds: dict[str, np.ndarray] | None = None
  for sequence in sequences:
    name = sequence.id or "(no id)"
    ours = {key: array[:0] for key, array in sequence.extras.items()}
    if kinds is None:
      kinds = ours
    if ours.keys() != kinds.keys():
      raise ValueError(
        f"sequence {name} has the extras {sorted(ours)}, others have"
        f" {sorted(kinds)}; all sequences of a batch need the same ones"
      )
    for key, array in sequence.extras.items():
      if len(array) != len(sequence.tokens):
        raise ValueError(
          f"extra {key!r} of sequence {name} has {len(array)} entries, the"
          f" sequence has {len(sequence.tokens)} tokens; give one a token"
        )
      kind = kinds[key]
      if (array.dtype, array.shape[1:]) != (kind.dtype, kind.shape[1:]):
        raise ValueError(
          f"extra {key!r} of sequence {name} is {array.dtype} with"
          f" {list(array.shape[1:])} a token, of others {kind.dtype} with"
          f" {list(kind.shape[1:])}; give all one kind"
        )
  return kinds or {}


def fill_rows(
  rows: Sequence[Sequence[Tokenized]],
  *,
  row_length: int,
  extras: Mapping[str, np.ndarray] | None = None,
) -> Batch:
  """Writes sequences into rows; a row may be empty.

  Args:
    rows: the sequences of every row; their slots must fit.
    row_length: T.
    extras: from `check_extras`, so that rows without a sequence have them too;
      by default those of the sequences given.

  Returns:
    A batch of shape [len(rows), T].
  """
  if extras is None:
    extras = check_extras(sequence for row in rows for sequence in row)
  shape = (len(rows), row_length)
  batch = Batch(
    tokens=np.zeros(shape, np.int32),
    targets=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    segment_ids=np.zeros(shape, np.int32),
    action_mask=np.zeros(shape, bool),
    decision_mask=np.zeros(shape, bool),
    rewards=np.zeros(shape, np.float32),
    extras={
      name: np.zeros((*shape, *kind.shape[1:]), kind.dtype)
      for name, kind in extras.items()
    },
  )
  for index, row in enumerate(rows):
    start = 0
    for segment, sequence in enumerate(row, start=1):
      slots = len(sequence.tokens) - 1
      end = start + slots
      if end > row_length:
        raise ValueError(
          f"row {index} needs {end} slots or more, has {row_length};"
          " raise --config.data.row_length"
        )
      at = (index, slice(start, end))
      batch.tokens[at] = sequence.tokens[:-1]
      batch.targets[at] = sequence.tokens[1:]
      batch.positions[at] = np.arange(slots)
      batch.segment_ids[at] = segment
      batch.action_mask[at] = sequence.action_mask[1:]
      batch.decision_mask[at] = sequence.decision_mask[1:]
      batch.rewards[at] = sequence.rewards[1:]
      for name, array in batch.extras.items():
        array[at] = sequence.extras[name][1:]
      start = end
  return batch


def pack(
  sequences: Sequence[Tokenized],
  *,
  row_length: int,
  batch_size: int | None = None,
  max_segments: int | None = None,
) -> Batch:
  """Packs all the sequences into one batch.

  Args:
    sequences: to pack, each of at most row_length + 1 tokens.
    row_length: T, slots of a row.
    batch_size: number of rows, the last ones empty if need be; by default as
      many as it takes.
    max_segments: at most so many sequences a row.

  Returns:
    The batch.

  Raises:
    ValueError: a sequence is longer than a row, or they need too many rows.
  """
  slots = check_lengths(sequences, row_length=row_length)
  plan = plan_rows(
    slots,
    np.arange(len(sequences)),
    row_length=row_length,
    max_members=max_segments,
  )
  if batch_size is not None and plan.num_rows > batch_size:
    raise ValueError(
      f"{len(sequences)} sequences need {plan.num_rows} rows of {row_length},"
      f" batch_size is {batch_size}; raise it or row_length"
    )
  num_rows = plan.num_rows if batch_size is None else batch_size
  rows = [
    [sequences[i] for i in plan.row(r)] if r < plan.num_rows else []
    for r in range(num_rows)
  ]
  return fill_rows(rows, row_length=row_length)


def check_lengths(
  sequences: Sequence[Tokenized], *, row_length: int
) -> np.ndarray:
  """Returns i64[N], the slots of every sequence, after checking that they fit.

  Raises:
    ValueError: a sequence has fewer than two tokens or does not fit a row.
  """
  slots = np.fromiter(
    (len(sequence.tokens) - 1 for sequence in sequences),
    np.int64,
    count=len(sequences),
  )
  for index in np.flatnonzero((slots < 1) | (slots > row_length))[:1]:
    name = sequences[index].id or f"number {index}"
    length = slots[index] + 1
    if length < 2:
      raise ValueError(f"sequence {name} has {length} tokens; it needs 2")
    raise ValueError(
      f"sequence {name} has {length} tokens, a row takes {row_length + 1};"
      " raise --config.data.row_length, or drop long sequences with"
      " --config.data.on_long=skip"
    )
  return slots
