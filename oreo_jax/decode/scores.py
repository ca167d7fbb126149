"""What the candidates of a search are ranked by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax


class Candidates(NamedTuple):
  """What R candidates may be ranked by: partial answers and whole ones."""

  values: jax.Array  # f32[R], V at the last trained state; nan without critic
  logps: jax.Array  # f32[R], log pi of the answer so far
  lengths: jax.Array  # i32[R], tokens of the answer so far
  finished: jax.Array  # bool[R], it ends with an end-of-sequence


# Returns f32[R]; the highest goes on, and -inf excludes a candidate. A function
# of its own for every call would be compiled every time.
Score = Callable[[Candidates], jax.Array]


def by_value(candidates: Candidates) -> jax.Array:
  """Ranks by the value network: the search of the paper."""
  return candidates.values


def by_logp(candidates: Candidates) -> jax.Array:
  """Ranks by the policy's own log-probability: a beam search without V."""
  return candidates.logps
