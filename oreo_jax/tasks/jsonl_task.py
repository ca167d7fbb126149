"""A user's own prompts with checkable answers, a JSON object a line.

Rows have `prompt`, `answer` and, to serve as demonstrations, `response`.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from oreo_jax.tasks.grading import MARKERS, MathGrader, extract_answer
from oreo_jax.tasks.question_task import Example, QuestionTask
from oreo_jax.tasks.rows import Row, field, read_rows


class ExactGrader:
  """Compares answers as text, but for white space at the ends.

  The answer is what follows the last marker; without one the response is the
  answer.

  Attributes:
    counts: stays empty, as texts can always be compared.
  """

  def __init__(self, *, markers: Sequence[str] = MARKERS) -> None:
    self.counts: collections.Counter[str] = collections.Counter()
    self._markers = tuple(markers)

  def extract(self, response: str) -> str:
    """Returns the final answer, or all of a response without a marker."""
    return extract_answer(response, self._markers) or response.strip()

  def grade_responses(
    self, references: Sequence[str], responses: Sequence[str]
  ) -> np.ndarray:
    """Returns f32[n]: 1 where the text is the reference."""
    return np.array(
      [
        self.extract(response) == reference.strip()
        for reference, response in zip(references, responses, strict=True)
      ],
      np.float32,
    )


def make_jsonl(
  *,
  path: str,
  prompt: str = "{question}",
  grading: str = "math",
  **grader_options: Any,
) -> QuestionTask:
  """Makes the task.

  Args:
    path: file or folder (see `data.records`); without files a split,
      problems are split 8:1:1 by a hash of their prompt.
    prompt: a key of `question_task.PROMPTS` or a text with `{question}`.
    grading: `math` (see `MathGrader`) or `exact` (see `ExactGrader`).
    **grader_options: options of the grader.
  """
  graders = {"math": MathGrader, "exact": ExactGrader}
  if grading not in graders:
    raise ValueError(
      f"jsonl grading must be one of {', '.join(graders)}; got {grading!r}"
    )

  def parse(row: Row) -> Example:
    response = row.fields.get("response") or ""
    return Example(
      field(row, "prompt", "question", "problem"),
      field(row, "answer"),
      response if isinstance(response, str) else "",
    )

  return QuestionTask(
    "jsonl",
    read=lambda: read_rows(path),
    parse=parse,
    prompt=prompt,
    grader=graders[grading](**grader_options),
  )
