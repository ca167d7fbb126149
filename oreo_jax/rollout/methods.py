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
      slots=self.settings.batch_size,
    )

  @property
  def sampler(self) -> decode.Sampler:
    """Returns how samples and proposals are drawn."""
    return decode.Sampler.of(self.settings)


class Judge(NamedTuple):
  """A value network and what it was trained on."""

  critic: Params
  granularity: str = "token"  # at which states: token | step
  reward_scale: float = 1.0  # on reward * scale + offset
  reward_offset: float = 0.0


class Outcome(NamedTuple):
  """What a method earned and what it cost."""

  label: str  # for tables
  # greedy, sample, vote, weighted_vote, best_of_n, best_of_k or beam
  search: str
  # Sequences a problem: N of best-of-N and votes, B of the beam; K of actions.
  budget: int
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
  policy: Params, judge: Judge | None, label: str, exam: Exam
) -> list[Outcome]:
  """Votes over samples and, with a value network, picks by value.

  The samples of the largest budget serve the smaller ones too.

  Args:
    policy: what is sampled from.
    judge: ranks the answers; None leaves the majority vote alone.
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
  judging, scores, weights = 0.0, None, None
  if judge is not None:
    start = time.monotonic()
    scores = decode.rank_all(
      judge.critic,
      exam.codec.prompts(exam.problems),
      answers.generation,
      exam.config,
      granularity=judge.granularity,
      stops=exam.codec.stops,
      batch_size=exam.settings.batch_size,
    )
    judging = time.monotonic() - start
    weights = decode.vote_weights(
      scores,
      reward_scale=judge.reward_scale,
      reward_offset=judge.reward_offset,
    )
  rewards = answers.table(answers.rewards)
  lengths = answers.table(answers.generation.lengths)
  finished = answers.table(answers.generation.finished)

  def vote(question: int, count: int, weights: np.ndarray | None) -> int:
    return decode.majority_vote(
      finals[question * most :][:count],
      None if weights is None else weights[question, :count],
      finished[question, :count],
    )

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
    outcomes.append(
      outcome(
        "vote",
        f"majority of {count}",
        count,
        lambda q, n=count: vote(q, n, None),
      )
    )
    if scores is not None:
      outcomes.append(
        outcome(
          "weighted_vote",
          f"value-weighted vote of {count}",
          count,
          lambda q, n=count: vote(q, n, weights),
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
  policy: Params, judge: Judge, label: str, exam: Exam
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
      plan = decode.make_plan(
        policy,
        judge.critic,
        jax.random.key(settings.seed),
        exam.config,
        strategy=decode.Strategy(
          beams=beams,
          max_steps=settings.max_steps,
          max_step_tokens=settings.max_step_tokens,
        ),
        stops=exam.codec.stops,
        eos_ids=exam.codec.end_ids,
        max_new_tokens=settings.max_new_tokens,
        sampler=exam.sampler,
        granularity=judge.granularity,
      )
      search = decode.search(
        plan,
        prompts,
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
