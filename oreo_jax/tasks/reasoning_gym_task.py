"""Problems of the `reasoning_gym` package (an optional extra).

Each of its data sets is a seeded stream: an item is a function of the seed and
its index. The response states its answer as `<answer>...</answer>`. The scorers
give partial credit, some of it for substrings, so only a full score counts.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from oreo_jax.tasks.grading import warn_of_failures
from oreo_jax.tasks.splits import text_hash, text_split
from oreo_jax.tasks.task import SPLITS, Problem, check_pairs, check_split

_INSTRUCTION = "Put the final answer between <answer> and </answer>.\n"
_MAX_DRAWS = 1_000_000


class ReasoningGymTask:
  """One data set of the package; see `Task` for the methods.

  Attributes:
    name: `reasoning_gym`.
    counts: answers `scored`, or graded 0 because there was `no_answer`, it was
      `too_long`, or the scorer raised (`error`).
  """

  name = "reasoning_gym"

  def __init__(
    self,
    *,
    dataset: str,
    seed: int = 0,
    train_size: int = 10_000,
    validation_size: int = 500,
    test_size: int = 1_000,
    max_chars: int = 4000,
    **dataset_options: Any,
  ) -> None:
    """Makes the task.

    Args:
      dataset: a name the package knows, e.g. `basic_arithmetic`.
      seed: of the stream. A problem's split is a hash of its question.
      train_size: problems of the train split when no count is given.
      validation_size: the same for validation.
      test_size: the same for test.
      max_chars: a longer answer is graded 0.
      **dataset_options: options of the data set.
    """
    try:
      import reasoning_gym
    except ImportError as error:
      raise ValueError(
        f"the task reasoning_gym needs its package ({error}); "
        "pip install reasoning_gym"
      ) from error
    self._items = reasoning_gym.create_dataset(
      dataset, seed=seed, size=_MAX_DRAWS, **dataset_options
    )
    self._sizes = dict(
      zip(SPLITS, (train_size, validation_size, test_size), strict=True)
    )
    self._max_chars = max_chars
    self.counts: collections.Counter[str] = collections.Counter()

  def problems(self, split: str, count: int | None = None) -> list[Problem]:
    """Returns the first `count` problems of a split (see `Task`)."""
    check_split(split)
    if count is None:
      count = self._sizes[split]
    problems: list[Problem] = []
    seen: set[int] = set()
    for index in range(_MAX_DRAWS):
      if len(problems) == count:
        return problems
      item = self._items[index]
      question = item["question"]
      code = text_hash(question)
      if code not in seen and text_split(question) == split:
        seen.add(code)
        prompt = f"{question}\n{_INSTRUCTION}"
        problems.append(Problem(str(index), prompt, str(item["answer"])))
    raise ValueError(
      f"found only {len(problems)} of {count} {split} problems; ask for fewer"
    )

  def demonstrations(
    self, count: int | None = None
  ) -> list[tuple[Problem, str]]:
    """Raises: the package has answers, but no worked ones."""
    raise ValueError(
      "reasoning_gym has no demonstrations; start from a checkpoint"
    )

  def grade(
    self, problems: Sequence[Problem], responses: Sequence[str]
  ) -> np.ndarray:
    """Returns f32[n]: 1 for a full score, 0 for less or a scorer that fails."""
    check_pairs(problems, responses)
    rewards = np.zeros(len(problems), np.float32)
    counts: collections.Counter[str] = collections.Counter()
    for i, (problem, response) in enumerate(
      zip(problems, responses, strict=True)
    ):
      answer = self.final_answer(response)
      if not answer:
        counts["no_answer"] += 1
      elif len(answer) > self._max_chars:
        counts["too_long"] += 1
      else:
        try:
          score = self._items.score_answer(answer, self._items[int(problem.id)])
          rewards[i] = score >= 1.0
          counts["scored"] += 1
        except Exception as error:  # scorers assume well-formed answers
          counts["error"] += 1
          logging.debug("scorer failed on problem %s: %r", problem.id, error)
    self.counts += counts
    warn_of_failures(
      counts,
      len(problems),
      advice="look at what the policy writes: the scorer takes well-formed "
      "answers alone",
    )
    return rewards

  def grading_report(self) -> dict[str, int]:
    """Returns the counts so far (see `Task`)."""
    return dict(self.counts)

  def final_answer(self, response: str) -> str:
    """Returns what the last `<answer>` tags hold, empty if nothing."""
    start = response.rfind("<answer>")
    end = response.find("</answer>", start)
    if start < 0 or end < 0:
      return ""
    return response[start + len("<answer>") : end].strip()

  def make_tokenizer(self) -> None:
    """Returns None: the tokenizer comes with the checkpoint."""
    return None
