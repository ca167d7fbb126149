"""What a task is: prompts, a verifier and, for embedded tasks, a teacher.

A task never sees a model. The stages ask it for problems, send back the
responses of whatever policy they run and get a 0/1 reward a response.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

  from oreo_jax.data.schema import Turn

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question.

  Attributes:
    id: unique within the task and its split, the same in every run.
    prompt: the text the policy continues.
    answer: what the verifier needs besides the prompt (may be empty).
  """

  id: str
  prompt: str
  answer: str = ""


@runtime_checkable
class Task(Protocol):
  r"""Prompts and an outcome verifier.

  Attributes:
    name: short name, as given to `get_task`.
  """

  name: str

  def problems(self, split: str, count: int | None = None) -> list[Problem]:
    """Returns the first `count` problems of a split (all of them if None).

    Splits are `train`, `validation` and `test`: disjoint and the same in
    every process.
    """
    ...

  def demonstrations(
    self, count: int | None = None
  ) -> Sequence[tuple[Problem, str | tuple[Turn, ...]]]:
    """Returns training problems with a teacher's answer, for SFT.

    The answer is a text that follows the prompt, or a whole conversation, which
    begins with what the user says.
    """
    ...

  def grade(
    self, problems: Sequence[Problem], responses: Sequence[str]
  ) -> np.ndarray:
    """Returns f32[n]: 1 where the response solves the problem, else 0."""
    ...

  def grading_report(self) -> dict[str, int]:
    """Returns how many answers `grade` decided so far, by how.

    The names in `grading.FAILURES` count answers that got 0 because they could
    not be compared. Empty for verifiers that cannot fail.
    """
    ...

  def final_answer(self, response: str) -> str:
    """Returns what votes are counted over: the answer in one spelling."""
    ...

  def make_tokenizer(self) -> PreTrainedTokenizerFast | None:
    """Returns the task's own tokenizer; None if a checkpoint brings it."""
    ...


def check_split(split: str) -> None:
  """Raises a ValueError unless `split` is one of `SPLITS`."""
  if split not in SPLITS:
    raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")


def check_pairs(problems: Sequence[Problem], responses: Sequence[str]) -> None:
  """Raises a ValueError unless there is one response a problem."""
  if len(problems) != len(responses):
    raise ValueError(
      "grade needs one response a problem; got "
      f"{len(problems)} problems and {len(responses)} responses"
    )
