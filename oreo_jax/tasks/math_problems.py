r"""MATH: competition problems whose answers stand in `\boxed{}`.

Rows have `problem`, `solution`, `level` (`Level 1` to `Level 5`) and `type`;
an `answer` column, as MATH-500 has it, is used when it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oreo_jax.tasks.grading import MathGrader, extract_answer
from oreo_jax.tasks.question_task import Example, QuestionTask
from oreo_jax.tasks.rows import Row, field, read_rows


def make_math(
  *,
  path: str = "DigitalLearningGmbH/MATH-lighteval",
  subset: str | None = None,
  test_path: str | None = None,
  levels: Sequence[int] = (),
  types: Sequence[str] = (),
  prompt: str = "boxed",
  **grader_options: Any,
) -> QuestionTask:
  r"""Makes the task.

  Args:
    path: hub name, file or folder (see `data.records`).
    subset: configuration on the hub.
    test_path: where the test split comes from instead, e.g.
      `HuggingFaceH4/MATH-500`; its problems are dropped from train.
    levels: keep only these levels, e.g. `(4, 5)`.
    types: keep only these types, e.g. `("Algebra",)`.
    prompt: a key of `question_task.PROMPTS` or a text with `{question}`.
    **grader_options: see `MathGrader`. Only `\boxed{}` counts by default.
  """

  def read() -> dict[str, list[Row]]:
    rows = read_rows(path, subset)
    if test_path is not None:
      other = read_rows(test_path)
      # A set with one split is a test set, whatever the split is called.
      rows["test"] = other["test"] if "test" in other else _only(other)
    return {split: [row for row in rows[split] if keep(row)] for split in rows}

  def keep(row: Row) -> bool:
    if types and row.fields.get("type", row.fields.get("subject")) not in types:
      return False
    level = str(row.fields.get("level", "")).removeprefix("Level ")
    return not levels or level in map(str, levels)

  def parse(row: Row) -> Example:
    solution = field(row, "solution")
    answer = row.fields.get("answer") or extract_answer(solution, ("boxed",))
    if not isinstance(answer, str):
      raise ValueError(
        f"{row.place}: 'solution' must hold its answer in '\\boxed{{}}'"
      )
    return Example(field(row, "problem").strip(), answer, solution)

  return QuestionTask(
    "math",
    read=read,
    parse=parse,
    prompt=prompt,
    grader=MathGrader(**({"markers": ("boxed",)} | grader_options)),
  )


def _only(rows: dict[str, list[Row]]) -> list[Row]:
  """Returns the rows of a data set that has a single split."""
  if len(rows) != 1:
    raise ValueError(
      "test_path must name a data set with a test split or a single one "
      f"(--config.task.options.test_path); it has {', '.join(rows)}"
    )
  return next(iter(rows.values()))
