"""Batches as a pure function of (seed, step): to resume is to seek.

Every epoch visits every sequence exactly once, in an order drawn from
(seed, epoch), packed into rows of one shape. An epoch is planned from the
lengths alone; arrays are made only for the rows asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from oreo_jax.data import construct, packing
from oreo_jax.data.errors import check_choice
from oreo_jax.data.packing import Batch
from oreo_jax.data.tokens import Tokenized


class Loader:
  """Gives the batch of every step; see `make_loader`.

  Attributes:
    num_steps: batches in all epochs together.
    num_epochs: epochs, the last one perhaps cut.
    num_sequences: sequences an epoch.
    max_segments: no row holds more sequences than this, in any epoch.
    row_length: T.
    local_rows: rows of this process, B.
    dropped: sequences left out because they do not fit a row.
  """

  def __init__(
    self,
    groups: Sequence[tuple[Tokenized, ...]],
    *,
    batch_size: int,
    row_length: int,
    seed: int,
    epochs: float,
    process_index: int,
    process_count: int,
    pack: bool,
    shuffle: bool,
    drop_last: bool,
    max_segments: int | None,
    given: np.ndarray,
    dropped: int,
  ):
    self._groups = groups
    # Of each group, its place among all that were given.
    self._given = given
    self._group_size = len(groups[0])
    self._extras = packing.check_extras(
      sequence for group in groups for sequence in group
    )
    self._slots = np.array(
      [sum(len(s.tokens) - 1 for s in group) for group in groups]
    )
    self._seed = seed
    self._batch_size = batch_size
    self._shuffle = shuffle
    self._max_groups = _max_groups(
      self._slots, row_length, max_segments, self._group_size, pack
    )
    self.local_rows = batch_size // process_count
    first_row = process_index * self.local_rows
    self._local = slice(first_row, first_row + self.local_rows)
    self.row_length = row_length
    self.num_sequences = len(groups) * self._group_size
    self.max_segments = self._max_groups * self._group_size
    self.dropped = dropped
    # The plans of the current epoch and the next; a plan is small, and pure.
    self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
    self.num_epochs = math.ceil(epochs)
    steps = []
    for epoch in reversed(range(self.num_epochs)):
      rows = self._plan(epoch).num_rows
      steps.append(rows // batch_size if drop_last else -(-rows // batch_size))
    # Step at which each epoch starts, and the end.
    self._epoch_starts = np.concatenate([[0], np.cumsum(steps[::-1])])
    cut = round((self.num_epochs - epochs) * steps[0])
    total = int(self._epoch_starts[-1])
    self.num_steps = max(total - cut, min(total, 1))
    if not self.num_steps:
      raise ValueError(
        f"{len(groups)} sequences fill less than one batch of {batch_size}"
        " rows; lower the batch size or keep the last batch"
      )

  @property
  def steps_per_epoch(self) -> float:
    """Mean number of batches an epoch; packing differs a little in each."""
    return float(self._epoch_starts[-1]) / self.num_epochs

  def steps_in(self, epoch: int) -> int:
    """Returns the number of batches of one epoch."""
    return int(self._epoch_starts[epoch + 1] - self._epoch_starts[epoch])

  def epoch_of(self, step: int) -> int:
    """Returns the epoch that a step belongs to."""
    if not 0 <= step < self.num_steps:
      raise ValueError(
        f"step {step} is outside the {self.num_steps} steps of"
        f" {self.num_epochs} epochs; raise the number of epochs"
      )
    return int(np.searchsorted(self._epoch_starts, step, side="right")) - 1

  def fill(self, epoch: int = 0) -> float:
    """Returns the share of slots, over all rows of an epoch, that hold data."""
    rows = self.steps_in(epoch) * self._batch_size
    plan = self._plan(epoch)
    used = plan.members[: plan.starts[min(rows, plan.num_rows)]]
    return float(self._slots[used].sum() / (rows * self.row_length))

  def batch(self, step: int) -> Batch:
    """Returns this process's rows of the batch of a step."""
    return self._fill(self._sequences(step))

  def mismatched(self, step: int) -> Batch:
    """Returns the batch of a step with its completions rotated by one.

    Segment k of a row is the prompt of that segment in `batch(step)` with the
    completion of the next sequence of the whole batch; see
    `construct.rotate_completions`.
    """
    rows = construct.rotate_completions(
      self._sequences(step), row_length=self.row_length
    )
    return self._fill(rows)

  def sequence_indices(self, step: int) -> np.ndarray:
    """Says which sequences a batch holds.

    Returns:
      i32[B, max_segments]: the index of the sequence with segment id k + 1 in
      column k, -1 where there is none. Indices count the sequences as they
      were given to `make_loader`, dropped ones too; those of pair k are 2k and
      2k + 1.
    """
    indices = np.full((self.local_rows, self.max_segments), -1, np.int32)
    size = self._group_size
    for row, groups in enumerate(self._rows(step)[self._local]):
      given = self._given[groups]
      members = (given[:, None] * size + np.arange(size)).ravel()
      indices[row, : len(members)] = members
    return indices

  def iterate(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
    """Yields (step, batch) from a step to the end."""
    for step in range(start_step, self.num_steps):
      yield step, self.batch(step)

  def _fill(self, rows: Sequence[Sequence[Tokenized]]) -> Batch:
    """Returns the batch of this process's share of the rows."""
    return packing.fill_rows(
      rows[self._local], row_length=self.row_length, extras=self._extras
    )

  def _rows(self, step: int) -> list[np.ndarray]:
    """Returns the groups of each row of the whole batch."""
    epoch = self.epoch_of(step)
    plan = self._plan(epoch)
    first = (step - int(self._epoch_starts[epoch])) * self._batch_size
    empty = np.zeros(0, np.int64)
    return [
      plan.row(row) if row < plan.num_rows else empty
      for row in range(first, first + self._batch_size)
    ]

  def _sequences(self, step: int) -> list[list[Tokenized]]:
    """Returns the sequences of each row of the whole batch."""
    return [
      [sequence for group in row for sequence in self._groups[group]]
      for row in self._rows(step)
    ]

  def _make_plan(self, epoch: int) -> packing.RowPlan:
    """Plans the rows of an epoch."""
    count = len(self._groups)
    rng = np.random.default_rng((self._seed, epoch))
    order = rng.permutation(count) if self._shuffle else np.arange(count)
    if self._max_groups == 1:
      return packing.RowPlan(order, np.arange(count + 1))
    plan = packing.plan_rows(
      self._slots,
      order,
      row_length=self.row_length,
      max_members=self._max_groups,
    )
    # Rows opened early in a window hold its longest sequences; mix them.
    return (
      plan.permute(rng.permutation(plan.num_rows)) if self._shuffle else plan
    )


def make_loader(
  sequences: Sequence[Tokenized] | Sequence[tuple[Tokenized, ...]],
  *,
  batch_size: int,
  row_length: int,
  seed: int = 0,
  epochs: float = 1,
  process_index: int = 0,
  process_count: int = 1,
  pack: bool = True,
  shuffle: bool = True,
  drop_last: bool = False,
  max_segments: int | None = None,
  on_long: str = "raise",
) -> Loader:
  """Makes a loader of sequences, or of pairs that share a row.

  Args:
    sequences: tokenised trajectories; or tuples of them, all of one size, that
      stand side by side in a row: of pairs (chosen, rejected), segments 2k - 1
      and 2k of a row are one.
    batch_size: rows of the global batch.
    row_length: T, slots of a row; a sequence of L tokens takes L - 1.
    seed: fixes the order of every epoch.
    epochs: visits of every sequence; of a fraction, the last epoch is cut.
    process_index: this process.
    process_count: processes that share a batch, each a contiguous slice.
    pack: several sequences (tuples) a row; otherwise one a row.
    shuffle: a new random order every epoch; otherwise the order given.
    drop_last: leave out an epoch's incomplete last batch, which is otherwise
      padded with empty rows.
    max_segments: at most so many sequences a row.
    on_long: "raise" on a sequence (tuple) that is longer than a row, or "skip"
      to drop and count such.

  Returns:
    The loader.

  Raises:
    ValueError: an argument is out of range, or nothing is left to load.
  """
  check_choice(on_long, "on_long")
  if not epochs > 0 or batch_size < 1:
    raise ValueError(
      f"epochs is {epochs} and batch_size {batch_size}; both must be positive"
    )
  if batch_size % process_count:
    raise ValueError(
      f"batch_size {batch_size} is not divisible by the {process_count}"
      " processes; change --config.train.batch_size"
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index is {process_index}, expected 0..{process_count - 1}"
    )
  groups = [(s,) if isinstance(s, Tokenized) else tuple(s) for s in sequences]
  given = np.flatnonzero([_fits(g, row_length, on_long) for g in groups])
  dropped = len(groups) - len(given)
  if dropped:
    logging.warning(
      "dropped %d of %d sequences longer than a row of %d slots",
      dropped,
      len(groups),
      row_length,
    )
  if not given.size:
    raise ValueError(
      "there is no sequence to load; check --config.data.path and"
      " --config.data.row_length"
    )
  return Loader(
    [groups[index] for index in given],
    batch_size=batch_size,
    row_length=row_length,
    seed=seed,
    epochs=epochs,
    process_index=process_index,
    process_count=process_count,
    pack=pack,
    shuffle=shuffle,
    drop_last=drop_last,
    max_segments=max_segments,
    given=given,
    dropped=dropped,
  )


def _fits(group: tuple[Tokenized, ...], row_length: int, on_long: str) -> bool:
  """Says whether a row takes the group, or raises if it should."""
  for sequence in group:
    if len(sequence.tokens) < 2:
      raise ValueError(
        f"sequence {sequence.id or '(no id)'} has {len(sequence.tokens)}"
        " tokens; a prediction needs 2"
      )
  slots = sum(len(sequence.tokens) - 1 for sequence in group)
  if slots <= row_length:
    return True
  if on_long == "skip":
    return False
  names = " + ".join(sequence.id or "(no id)" for sequence in group)
  raise ValueError(
    f"sequence {names} of {slots + len(group)} tokens takes {slots} slots, a"
    f" row has {row_length}; raise --config.data.row_length, or drop long ones"
    " with --config.data.on_long=skip"
  )


def _max_groups(
  slots: np.ndarray,
  row_length: int,
  max_segments: int | None,
  group_size: int,
  pack: bool,
) -> int:
  """Returns the most groups a row can hold."""
  if not pack:
    return 1
  most = max(1, min(row_length // int(slots.min()), len(slots)))
  if max_segments is None:
    return most
  if max_segments < group_size:
    raise ValueError(
      f"max_segments is {max_segments}; a row must hold at least {group_size}"
    )
  return min(most, max_segments // group_size)
