"""Every way to answer held-out problems: greedy, votes, best-of-N, beam.

A method takes a policy, perhaps a value network, and an `Exam`, and returns
what it earned a problem and what it cost. Methods of one budget that need
samples share one set of samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from oreo_jax import decode, hosts
from oreo_jax.config import EvaluateConfig, ModelConfig
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.rollout.answers import Answers, answer_problems, grade_texts
from oreo_jax.rollout.codec import Codec
from oreo_jax.tasks import Problem, Task


class Exam(NamedTuple):
  """Held-out problems and how they are to be answered."""

  problems: Sequence[Problem]
  task: Task
  codec: Codec
  config: ModelConfig  # of the policy and of the value network
  settings: EvaluateConfig

  def answer(
    self,
    policy: Params,
    description: str,
    *,
    num_samples: int = 1,
    sampler: decode.Sampler = decode.GREEDY,
  ) -> Answers:
    """Samples and grades answers to all problems."""
    return answer_problems(
      policy,
      self.problems,
      self.task,
      self.codec,
      self.config,
      description=description,
      seed=self.settings.seed,
      num_samples=num_samples,
      sampler=sampler,
      max_new_tokens=self.settings.max_new_tokens,
      batch_size=self.settings.batch_size,
    )

  @property
  def sampler(self) -> decode.Sampler:
    """Returns how samples and proposals are drawn."""
    return decode.Sampler(self.settings.temperature, top_p=self.settings.top_p)


class Outcome(NamedTuple):
  """What a method earned and what it cost."""

  label: str  # for tables
  search: str  # greedy | sample | vote | weighted_vote | best_of_n | beam
  budget: int  # sequences a problem: N of best-of-N and votes, B of the beam
  rewards: np.ndarray  # f32[problems]
  tokens: float  # generated for a problem, all samples or proposals
  seconds: float


def plain_methods(policy: Params, label: str, exam: Exam) -> list[Outcome]:
  """Answers greedily, and with one sample."""
  outcomes = []
  for search, title, sampler in (
    ("greedy", "greedy", decode.GREEDY),
    ("sample", "one sample", exam.sampler),
  ):
    answers = exam.answer(policy, f"{label}, {search}", sampler=sampler)
    tokens = float(answers.generation.lengths.mean())
    outcomes.append(
      Outcome(
        f"{label}, {title}",
        search,
        1,
        answers.rewards,
        tokens,
        answers.seconds,
      )
    )
  return outcomes


def sampled_methods(
  policy: Params, critic: Params | None, label: str, exam: Exam
) -> list[Outcome]:
  """Votes over samples and, with a value network, picks by value.

  The samples of the largest budget serve the smaller ones too.

  Args:
    policy: what is sampled from.
    critic: ranks the answers; None leaves the majority vote alone.
    label: of the policy.
    exam: the problems.
  """
  most = max(exam.settings.budgets)
  answers = exam.answer(
    policy,
    f"{label}, {most} samples",
    num_samples=most,
    sampler=exam.sampler,
  )
  finals = [exam.task.final_answer(text) for text in answers.texts]
  judging, scores = 0.0, None
  if critic is not None:
    start = time.monotonic()
    scores = answers.table(
      decode.reduce_values(
        values_along(critic, answers, exam), answers.generation
      )
    )
    judging = time.monotonic() - start
  rewards = answers.table(answers.rewards)
  lengths = answers.table(answers.generation.lengths)

  def outcome(
    search: str, title: str, count: int, choose: Callable[[int], int]
  ) -> Outcome:
    chosen = np.array([rewards[q, choose(q)] for q in range(len(rewards))])
    cost = answers.seconds * count / most
    if search != "vote":
      cost += judging * count / most
    tokens = float(lengths[:, :count].sum(axis=1).mean())
    return Outcome(f"{label} + {title}", search, count, chosen, tokens, cost)

  outcomes = []
  for count in (n for n in exam.settings.budgets if n > 1):

    def votes(question: int, count: int = count) -> list[str]:
      return finals[question * most :][:count]

    outcomes.append(
      outcome(
        "vote",
        f"majority of {count}",
        count,
        lambda q, votes=votes: decode.majority_vote(votes(q)),
      )
    )
    if scores is not None:
      outcomes.append(
        outcome(
          "weighted_vote",
          f"value-weighted vote of {count}",
          count,
          lambda q, votes=votes, n=count: decode.majority_vote(
            votes(q), scores[q, :n]
          ),
        )
      )
      outcomes.append(
        outcome(
          "best_of_n",
          f"best of {count} by value",
          count,
          lambda q, n=count: int(np.argmax(scores[q, :n])),
        )
      )
  return outcomes


def beam_methods(
  policy: Params, critic: Params, label: str, exam: Exam
) -> list[Outcome]:
  """Searches step by step with the value, at every budget."""
  settings = exam.settings
  prompts = exam.codec.prompts(exam.problems)
  outcomes = []
  for beams in (n for n in settings.budgets if n > 1):
    start = time.monotonic()
    with Progress(
      len(prompts),
      f"{label}, beam {beams}",
      unit="problem",
      enabled=hosts.is_chief(),
    ) as progress:
      search = decode.search_all(
        policy,
        critic,
        prompts,
        jax.random.key(settings.seed),
        exam.config,
        beams=beams,
        stops=exam.codec.stops,
        eos_ids=exam.codec.end_ids,
        max_new_tokens=settings.max_new_tokens,
        max_steps=settings.max_steps,
        max_step_tokens=settings.max_step_tokens,
        sampler=exam.sampler,
        batch_size=settings.batch_size,
        on_progress=progress.update,
      )
    seconds = time.monotonic() - start
    rewards = grade_texts(
      exam.task,
      exam.problems,
      exam.codec.texts(search.answers),
      search.answers.finished,
    )
    outcomes.append(
      Outcome(
        f"{label} + beam search B={beams}",
        "beam",
        beams,
        rewards,
        float(search.proposed.mean()),
        seconds,
      )
    )
  return outcomes


def values_along(critic: Params, answers: Answers, exam: Exam) -> np.ndarray:
  """Returns f32[R, max_new_tokens + 1], V along the answers, in batches."""
  prompts = exam.codec.prompts(exam.problems)
  samples, generation = answers.samples, answers.generation
  size = max(exam.settings.batch_size // samples, 1)
  size = min(size, len(prompts))
  along = np.zeros((len(generation.lengths), generation.tokens.shape[1] + 1))
  for indices, rows, room in decode.batched(prompts, size):
    place = (indices[:, None] * samples + np.arange(samples)).ravel()
    filled = np.resize(place, size * samples)  # the last batch is filled up
    batch = decode.Generation(*(x[filled] for x in generation))
    values = decode.answer_values(
      critic, rows, batch, exam.config, prompt_length=room
    )
    along[place] = values[: len(place)]
  return along
