"""Extras that are worked out for a whole data set before it is loaded.

What a frozen network says of a sequence depends on its tokens alone. It is
worked out once for sequences of the same tokens, such as an answer that was
sampled twice or that stands in two pairs, and given to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from oreo_jax.data.tokens import Tokenized

Group = Tokenized | tuple[Tokenized, ...]


def unique_sequences(
  groups: Sequence[Group], *, row_length: int
) -> dict[bytes, Tokenized]:
  """Returns one sequence of each kind, without extras, by its tokens.

  Args:
    groups: what a loader packs.
    row_length: slots of a row; sequences that no row takes are left out, as
      the loader leaves them out or refuses them.
  """
  unique: dict[bytes, Tokenized] = {}
  for group in groups:
    for sequence in (group,) if isinstance(group, Tokenized) else group:
      if 2 <= len(sequence.tokens) <= row_length + 1:
        bare = sequence._replace(extras={})
        unique.setdefault(_bytes_of(sequence), bare)
  return unique


def add_extra(
  groups: Sequence[Group], name: str, arrays: Mapping[bytes, np.ndarray]
) -> list[Group]:
  """Returns the groups with one more extra.

  Args:
    groups: what a loader packs.
    name: of the extra.
    arrays: [L, ...] a sequence, by the keys of `unique_sequences`; sequences
      that are not there stay as they are.
  """

  def extended(sequence: Tokenized) -> Tokenized:
    array = arrays.get(_bytes_of(sequence))
    if array is None:
      return sequence
    return sequence._replace(extras={**sequence.extras, name: array})

  return [
    extended(group)
    if isinstance(group, Tokenized)
    else tuple(map(extended, group))
    for group in groups
  ]


def _bytes_of(sequence: Tokenized) -> bytes:
  return np.ascontiguousarray(sequence.tokens, np.int32).tobytes()
