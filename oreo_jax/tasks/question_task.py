r"""Tasks over a data set of questions, graded by the final answer.

`gsm8k`, `math` and `jsonl` are this with their own way to read a row.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from oreo_jax.tasks.grading import vote_key
from oreo_jax.tasks.rows import Row, split_rows
from oreo_jax.tasks.task import Problem, check_pairs, check_split

_BOXED = (
  "Please reason step by step, and put your final answer within \\boxed{}."
)

# Prompts by name; `{question}` is replaced. The paper's runs ask for a boxed
# answer: Qwen in the system turn, DeepSeekMath after the question.
PROMPTS = {
  "plain": "{question}\n",
  "boxed": "{question}\n" + _BOXED + "\n",
  "qwen": (
    f"<|im_start|>system\n{_BOXED}<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
  ),
  "deepseek": "User: {question}\n" + _BOXED + "\n\nAssistant:",
}


class Example(NamedTuple):
  """A question with its answer."""

  question: str
  answer: str  # the final answer alone
  solution: str  # worked, ends in the final answer; empty if there is none


class Grader(Protocol):
  """Cuts out and compares final answers.

  Attributes:
    counts: how answers were decided so far.
  """

  counts: collections.Counter[str]

  def extract(self, response: str) -> str | None:
    """Returns the final answer of a response, None if it states none."""
    ...

  def grade_responses(
    self, references: Sequence[str], responses: Sequence[str]
  ) -> np.ndarray:
    """Returns f32[n] of 0 and 1."""
    ...


class QuestionTask:
  """Problems of a data set; see `Task` for the methods.

  Attributes:
    name: the task's name.
    grader: compares final answers and counts how it went.
  """

  def __init__(
    self,
    name: str,
    *,
    read: Callable[[], dict[str, list[Row]]],
    parse: Callable[[Row], Example],
    prompt: str,
    grader: Grader,
  ) -> None:
    """Makes a task; nothing is read before it is asked for.

    Args:
      name: the task's name.
      read: returns the rows by split name (see `data.records`).
      parse: reads a row; raises a ValueError that names its place.
      prompt: a key of `PROMPTS`, or a text that holds `{question}`.
      grader: compares final answers.
    """
    self.name = name
    self.grader = grader
    self._read = read
    self._parse = parse
    self._prompt = PROMPTS.get(prompt, prompt)
    if "{question}" not in self._prompt:
      raise ValueError(
        f"{name} prompt must be one of {', '.join(PROMPTS)} or hold "
        f"{{question}}; got {prompt!r}"
      )

  def problems(self, split: str, count: int | None = None) -> list[Problem]:
    """Returns the first `count` problems of a split (see `Task`)."""
    check_split(split)
    return [
      self._as_problem(split, index, example)
      for index, example in enumerate(self._examples[split][:count])
    ]

  def demonstrations(
    self, count: int | None = None
  ) -> list[tuple[Problem, str]]:
    """Returns the training problems that have a solution, with it."""
    pairs = [
      (self._as_problem("train", index, example), example.solution)
      for index, example in enumerate(self._examples["train"])
      if example.solution
    ]
    return pairs[:count]

  def grade(
    self, problems: Sequence[Problem], responses: Sequence[str]
  ) -> np.ndarray:
    """Returns f32[n]: 1 where the final answer is right, else 0."""
    check_pairs(problems, responses)
    return self.grader.grade_responses(
      [problem.answer for problem in problems], responses
    )

  def grading_report(self) -> dict[str, int]:
    """Returns the counts of the grader (see `Task`)."""
    return dict(self.grader.counts)

  def final_answer(self, response: str) -> str:
    """Returns the final answer, plain numbers in one spelling for votes."""
    return vote_key(self.grader.extract(response) or "")

  def make_tokenizer(self) -> None:
    """Returns None: the tokenizer comes with the checkpoint."""
    return None

  @functools.cached_property
  def _examples(self) -> dict[str, list[Example]]:
    rows = split_rows(self._read(), lambda row: self._parse(row).question)
    return {split: [self._parse(r) for r in rows[split]] for split in rows}

  def _as_problem(self, split: str, index: int, example: Example) -> Problem:
    prompt = self._prompt.replace("{question}", example.question)
    return Problem(f"{split}-{index}", prompt, example.answer)
