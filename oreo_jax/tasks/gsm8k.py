r"""GSM8K: grade-school word problems whose answers end in `#### N`.

Rows have `question` and `answer`. Solutions carry calculator annotations such
as `<<48/2=24>>`, which are taken out unless asked for.
"""

from __future__ import annotations

import re
from typing import Any

from oreo_jax.tasks.grading import MARKERS, MathGrader, extract_answer
from oreo_jax.tasks.question_task import Example, QuestionTask
from oreo_jax.tasks.rows import Row, field, read_rows

ANSWER_FORMATS = {"####": "#### {}", "boxed": "\\boxed{{{}}}", "A:": "A: {}"}

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def make_gsm8k(
  *,
  path: str = "openai/gsm8k",
  subset: str | None = "main",
  prompt: str = "plain",
  answer_format: str = "####",
  keep_annotations: bool = False,
  **grader_options: Any,
) -> QuestionTask:
  r"""Makes the task.

  Args:
    path: hub name, file or folder (see `data.records`).
    subset: configuration on the hub.
    prompt: a key of `question_task.PROMPTS` or a text with `{question}`.
    answer_format: how demonstrations end: `####`, `boxed` or `A:`. Grading
      takes the last of the three that a response holds.
    keep_annotations: leave `<<48/2=24>>` in the demonstrations.
    **grader_options: see `MathGrader`.
  """
  if answer_format not in MARKERS:
    raise ValueError(
      f"gsm8k answer_format must be one of {', '.join(MARKERS)}; "
      f"got {answer_format!r}"
    )

  def parse(row: Row) -> Example:
    solution = field(row, "answer")
    answer = extract_answer(solution, ("####",))
    if answer is None:
      raise ValueError(f"{row.place}: 'answer' must end in '#### N'")
    steps = solution[: solution.rindex("####")].rstrip()
    if not keep_annotations:
      steps = _ANNOTATION.sub("", steps)
    ending = ANSWER_FORMATS[answer_format].format(answer)
    question = field(row, "question").strip()
    return Example(question, answer, f"{steps}\n{ending}".lstrip())

  return QuestionTask(
    "gsm8k",
    read=lambda: read_rows(path, subset),
    parse=parse,
    prompt=prompt,
    grader=MathGrader(**grader_options),
  )
