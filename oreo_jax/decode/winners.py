"""The best answers of a search so far."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax.decode.suffixes import pick_rows, where_rows


class Winners(NamedTuple):
  """Answers, such as the best one so far of each of Q questions."""

  tokens: jax.Array  # i32[Q, A]; rubbish beyond `lengths`
  lengths: jax.Array  # i32[Q]
  logps: jax.Array  # f32[Q, A]
  finished: jax.Array  # bool[Q], it ends with an end-of-sequence
  values: jax.Array  # f32[Q], V of it
  scores: jax.Array  # f32[Q], what it is ranked by; -inf while there is none


def keep_best(
  winners: Winners, beams: Winners, *, leaving: jax.Array
) -> Winners:
  """Returns the winners after some beams have left.

  The best leaving beam of each question takes the place of a worse winner.
  Answers are compared by (finished, score): one that ended with an
  end-of-sequence beats every one that was cut off, whatever their scores, and
  among equals the score decides. The earlier one stays at a tie.

  Args:
    winners: so far, of Q questions.
    beams: Q * B answers, question-major.
    leaving: bool[Q * B], which of `beams` leave; the others do not compete.
  """
  questions = winners.scores.shape[0]
  leaving, finished, scores = (
    x.reshape(questions, -1) for x in (leaving, beams.finished, beams.scores)
  )
  finished &= leaving
  # The best beam of each question. If one of them finished, only the finished
  # ones compete; otherwise all that leave do.
  any_finished = jnp.any(finished, axis=1)
  competing = leaving & (finished == any_finished[:, None])
  scores = jnp.where(competing, scores, -jnp.inf)
  best = jnp.argmax(scores, axis=1)
  score = jnp.max(scores, axis=1)
  # Against the winner so far: of two that are alike in having finished the
  # score decides, otherwise the one that finished. A score of -inf says that
  # no beam leaves.
  alike = any_finished == winners.finished
  better = jnp.where(alike, score > winners.scores, any_finished)
  better &= score > -jnp.inf

  best_beams = pick_rows(
    beams._replace(finished=beams.finished & leaving.reshape(-1)),
    best[:, None],
  )
  return where_rows(better, best_beams, winners)
