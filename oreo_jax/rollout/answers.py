"""A policy answers problems: sample, decode to text, grade.

The functions take models, arrays and a `Codec`, never a work directory, so that
any stage or a user's own script can call them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from oreo_jax import decode, hosts
from oreo_jax.config import ModelConfig
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.rollout.codec import Codec
from oreo_jax.tasks import Problem, Task


class Answers(NamedTuple):
  """Graded answers to n problems, `samples` each, those of one side by side."""

  problems: Sequence[Problem]  # n
  generation: decode.Generation  # n * samples rows
  texts: list[str]  # n * samples
  rewards: np.ndarray  # f32[n * samples]; 0 for an answer that was cut off
  seconds: float  # sampling and decoding, without grading

  @property
  def samples(self) -> int:
    """Returns how many answers each problem has."""
    return len(self.texts) // len(self.problems)

  @property
  def problem_ids(self) -> list[str]:
    """Returns the id of each answer's problem."""
    return [p.id for p in self.problems for _ in range(self.samples)]

  def table(self, figures: np.ndarray) -> np.ndarray:
    """Lays one figure an answer out as [problems, samples]."""
    return np.asarray(figures).reshape(len(self.problems), self.samples)


def answer_problems(
  policy: Params,
  problems: Sequence[Problem],
  task: Task,
  codec: Codec,
  config: ModelConfig,
  *,
  seed: int,
  description: str,
  num_samples: int = 1,
  sampler: decode.Sampler = decode.GREEDY,
  **options: Any,
) -> Answers:
  """Samples answers to problems and grades them, with a progress bar.

  Args:
    policy: what is sampled from.
    problems: n of them.
    task: grades the answers.
    codec: makes prompts of problems and text of tokens.
    config: the policy's architecture.
    seed: of the draws.
    description: shown beside the progress bar.
    num_samples: answers a problem.
    sampler: how tokens are drawn.
    **options: of `decode.generate_all`, such as `max_new_tokens`.

  Returns:
    The n * num_samples answers, those of one problem side by side.
  """
  start = time.monotonic()
  with Progress(
    len(problems) * num_samples,
    description,
    unit="answer",
    enabled=hosts.is_chief(),
  ) as progress:
    generation = decode.generate_all(
      policy,
      codec.prompts(problems),
      jax.random.key(seed),
      config,
      eos_ids=codec.end_ids,
      num_samples=num_samples,
      sampler=sampler,
      on_progress=progress.update,
      **options,
    )
  texts = codec.texts(generation)
  seconds = time.monotonic() - start
  asked = [problem for problem in problems for _ in range(num_samples)]
  rewards = grade_texts(task, asked, texts, generation.finished)
  return Answers(problems, generation, texts, rewards, seconds)


def grade_texts(
  task: Task,
  problems: Sequence[Problem],
  texts: Sequence[str],
  finished: np.ndarray,
) -> np.ndarray:
  """Grades answers.

  A verifier can take longer than the sampling, so each process grades the
  answers to its share of the problems, and they tell each other.

  Args:
    task: the verifier.
    problems: of each answer.
    texts: n answers, the same on every process.
    finished: bool[n]; an answer that was cut off earns 0.

  Returns:
    f32[n], the same on every process.
  """
  # All answers to a problem go to one process: a verifier decides equal ones
  # once.
  by_problem: dict[str, list[int]] = {}
  for row, problem in enumerate(problems):
    by_problem.setdefault(problem.id, []).append(row)
  groups = list(by_problem.values())
  rows = [row for place in hosts.share_of(len(groups)) for row in groups[place]]
  grades = task.grade(
    [problems[row] for row in rows], [texts[row] for row in rows]
  )
  rewards = np.zeros(len(texts), np.float32)
  for their_rows, their_grades in hosts.gather([rows, grades.tolist()]):
    rewards[their_rows] = their_grades
  return rewards * finished


def grading_counts(task: Task) -> Counter[str]:
  """Returns how many answers were decided so far, by how, on all processes."""
  counts: Counter[str] = Counter()
  for report in hosts.gather(task.grading_report()):
    counts.update(report)
  return counts
