"""Grades final answers of mathematics problems.

The final answer is cut out first, plain answers are compared exactly, and only
the rest goes to math-verify, in worker processes that can be killed. Nothing a
policy writes can stop, stall or break the caller: such an answer is graded 0
and counted.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Sequence

import numpy as np

from oreo_jax.tasks.grading.answers import (
  MARKERS,
  extract_answer,
  normalize_answer,
  spell_for_algebra,
)
from oreo_jax.tasks.grading.compare import compare_plainly
from oreo_jax.tasks.grading.pool import GraderPool
from oreo_jax.tasks.grading.report import warn_of_failures


class MathGrader:
  """Compares the final answers of responses with references.

  Attributes:
    counts: how answers were decided so far: `plain` (without a worker), by
      math-verify `equal` or `different`, or graded 0 because there was
      `no_answer`, it was `too_long`, or the worker failed (see
      `GraderPool.compare`). More than 1% of failures in one call are logged.
  """

  def __init__(
    self,
    *,
    markers: Sequence[str] = MARKERS,
    workers: int | None = None,
    timeout_s: float = 5.0,
    max_chars: int = 1000,
    memory_mb: int = 1024,
  ) -> None:
    """Makes a grader; worker processes start when an answer needs one.

    Args:
      markers: which markers state an answer (see `answers.MARKERS`).
      workers: most worker processes; by default one a core, at most 4.
      timeout_s: processor time an answer may take in a worker, so that
        labels do not depend on what else the machine does.
      max_chars: a longer answer is graded 0.
      memory_mb: address space a worker may use.
    """
    unknown = set(markers) - set(MARKERS)
    if unknown or not markers:
      raise ValueError(
        f"markers must be some of {', '.join(MARKERS)}; got {list(markers)}"
      )
    if not 0 < max_chars <= 4000:
      raise ValueError(f"max_chars must be 1 to 4000; got {max_chars}")
    self.counts: collections.Counter[str] = collections.Counter()
    self._markers = tuple(markers)
    self._max_chars = max_chars
    self._lock = threading.Lock()
    self._pool = GraderPool(
      workers=workers or min(os.cpu_count() or 1, 4),
      timeout_s=timeout_s,
      memory_mb=memory_mb,
    )

  def extract(self, response: str) -> str | None:
    """Returns the final answer of a response, None if it states none."""
    return extract_answer(response, self._markers, self._max_chars)

  def grade_responses(
    self, references: Sequence[str], responses: Sequence[str]
  ) -> np.ndarray:
    """Returns f32[n]: 1 where a response's final answer is the reference."""
    return self.grade_answers(
      references, [self.extract(response) for response in responses]
    )

  def grade_answers(
    self, references: Sequence[str], answers: Sequence[str | None]
  ) -> np.ndarray:
    """Returns f32[n]: 1 where the answer equals the reference, else 0.

    Args:
      references: right answers, already cut out.
      answers: answers to grade; None and the empty string are wrong.
    """
    if len(references) != len(answers):
      raise ValueError(
        f"got {len(references)} references and {len(answers)} answers"
      )
    rewards = np.zeros(len(answers), np.float32)
    counts: collections.Counter[str] = collections.Counter()
    # Pairs that take algebra, each with the indices it stands at.
    undecided: dict[tuple[str, str], list[int]] = {}
    with self._lock:
      for i, (reference, answer) in enumerate(
        zip(references, answers, strict=True)
      ):
        if not answer:
          counts["no_answer"] += 1
        elif len(answer) > self._max_chars:
          counts["too_long"] += 1
        else:
          expected, given = (
            normalize_answer(reference),
            normalize_answer(answer),
          )
          equal = compare_plainly(expected, given)
          if equal is None:
            pair = spell_for_algebra(expected), spell_for_algebra(given)
            undecided.setdefault(pair, []).append(i)
          else:
            counts["plain"] += 1
            rewards[i] = equal
      outcomes = self._pool.compare(list(undecided))
      for indices, outcome in zip(undecided.values(), outcomes, strict=True):
        counts[outcome] += len(indices)
        rewards[indices] = outcome == "equal"
      self.counts += counts
    warn_of_failures(
      counts,
      len(answers),
      advice="look at what the policy writes, or raise "
      "--config.task.options.timeout_s or memory_mb",
    )
    return rewards

  def close(self) -> None:
    """Ends the worker processes."""
    self._pool.close()
