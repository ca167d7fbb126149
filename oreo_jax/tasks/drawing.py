"""Draws distinct problems into disjoint splits, reproducibly.

A problem's split follows from the problem itself, whatever the seed (see
`splits`): nothing trained on one seed has seen the test problems of another.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from oreo_jax.tasks.splits import split_indices
from oreo_jax.tasks.task import SPLITS

_MAX_BARREN_CHUNKS = 50


def code_hashes(codes: np.ndarray) -> np.ndarray:
  """Returns uint64[N]: an evenly spread hash of every row of codes[N, F]."""
  weights = np.random.default_rng(2412_16145).integers(
    0, 2**64, codes.shape[1], np.uint64
  )
  # Multiply and shift (splitmix64's finaliser) over a weighted sum.
  code = (codes.astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
  code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return code ^ (code >> np.uint64(31))


def draw_distinct(
  draw: Callable[
    [np.random.Generator], tuple[np.ndarray, tuple[np.ndarray, ...]]
  ],
  split: str,
  count: int,
  *,
  seed: int,
) -> tuple[np.ndarray, ...]:
  """Draws `count` distinct problems of a split, chunk by chunk.

  The first k problems do not depend on `count`.

  Args:
    draw: makes a chunk of candidates from a generator: codes[N, F], what makes
      two problems the same, and a tuple of arrays [N, ...], the problems.
    split: one of `SPLITS`.
    count: how many problems.
    seed: of all draws.

  Returns:
    The arrays of `draw`, each with a leading axis of `count`.

  Raises:
    ValueError: if chunk after chunk holds nothing new.
  """
  index = SPLITS.index(split)
  seen: set[bytes] = set()
  chunks: list[tuple[np.ndarray, ...]] = []
  drawn = barren_chunks = 0
  while drawn < count or not chunks:
    codes, arrays = draw(np.random.default_rng([seed, index, len(chunks)]))
    new_rows = []
    in_split = split_indices(code_hashes(codes)) == index
    for row in np.flatnonzero(in_split).tolist():
      key = codes[row].tobytes()
      if key not in seen:
        seen.add(key)
        new_rows.append(row)
    chunks.append(tuple(array[new_rows] for array in arrays))
    drawn += len(new_rows)
    barren_chunks = 0 if new_rows else barren_chunks + 1
    if barren_chunks == _MAX_BARREN_CHUNKS:
      raise ValueError(
        f"the task's settings give only {drawn} {split} problems; "
        f"ask for fewer than {count} or loosen them"
      )
  return tuple(
    np.concatenate(pieces)[:count] for pieces in zip(*chunks, strict=True)
  )
