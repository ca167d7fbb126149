"""What the candidates of a search are ranked by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax


class Candidates(NamedTuple):
  """What R candidates may be ranked by: partial answers and whole ones.

  Values are nan without a critic. They are read where the critic was trained
  alone, the state before the answer included (`values.readable_states`).
  """

  values: jax.Array  # f32[R], V at the last such state
  min_values: jax.Array  # f32[R], the least V of the answer so far
  mean_values: jax.Array  # f32[R], the mean V of the answer so far
  logps: jax.Array  # f32[R], log pi of the answer so far
  lengths: jax.Array  # i32[R], tokens of the answer so far
  finished: jax.Array  # bool[R], it ends with an end-of-sequence


# Returns f32[R]; the highest goes on, and -inf excludes a candidate. A function
# of its own for every call would be compiled every time.
Score = Callable[[Candidates], jax.Array]


def by_value(candidates: Candidates) -> jax.Array:
  """Ranks by the value network: the search of the paper."""
  return candidates.values


def by_min_value(candidates: Candidates) -> jax.Array:
  """Ranks by the worst state that an answer went through."""
  return candidates.min_values


def by_mean_value(candidates: Candidates) -> jax.Array:
  """Ranks by the mean over the states that an answer went through."""
  return candidates.mean_values


def by_logp(candidates: Candidates) -> jax.Array:
  """Ranks by the policy's own log-probability: a beam search without V."""
  return candidates.logps


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The score V + weight * log pi; see `mixture`."""

  weight: float

  def __call__(self, candidates: Candidates) -> jax.Array:
    """Returns the score of each candidate."""
    return candidates.values + self.weight * candidates.logps


def mixture(weight: float) -> Score:
  """Returns a score of value and policy: V + weight * log pi.

  Scores of equal weights are equal, so that asking for one twice compiles once.

  Args:
    weight: of the log-probability of the answer so far; 0 is `by_value`.
  """
  return Mixture(float(weight))


def needs_values(score: Score) -> bool:
  """Returns whether a score of this module needs a value network."""
  return isinstance(score, Mixture) or score in (
    by_value,
    by_min_value,
    by_mean_value,
  )
