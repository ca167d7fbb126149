"""Grading of final answers: cutting out, comparing, worker processes.

Example:
  >>> MathGrader().grade_responses(["3/2"], ["That makes #### 1 1/2"])
  array([1.], dtype=float32)
"""

from oreo_jax.tasks.grading.answers import (
  MARKERS,
  extract_answer,
  normalize_answer,
)
from oreo_jax.tasks.grading.compare import (
  PlainNumber,
  compare_plainly,
  plain_number,
  vote_key,
)
from oreo_jax.tasks.grading.grader import MathGrader
from oreo_jax.tasks.grading.report import FAILURES, warn_of_failures

__all__ = [
  "FAILURES",
  "MARKERS",
  "MathGrader",
  "PlainNumber",
  "compare_plainly",
  "extract_answer",
  "normalize_answer",
  "plain_number",
  "vote_key",
  "warn_of_failures",
]
