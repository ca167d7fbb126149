"""Collecting answers: sampled, graded and kept in shards while others grow.

As an answer depends on its problem and its sample alone, the result of a run
that was killed and started again is that of one that was never stopped.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from oreo_jax import data, decode, hosts
from oreo_jax.config import ModelConfig
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.rollout.answers import grade_texts
from oreo_jax.rollout.codec import Codec
from oreo_jax.rollout.shards import TRAJECTORIES_A_SHARD, Shards
from oreo_jax.tasks import Problem, Task


class Collected(NamedTuple):
  """Graded answers as trajectories, in the order of problems and samples."""

  trajectories: list[data.Trajectory]
  usage: decode.Usage  # of this run's slots
  seconds: float  # of this run's sampling, without grading


def collect_answers(
  policy: Params,
  problems: Sequence[Problem],
  task: Task,
  codec: Codec,
  config: ModelConfig,
  folder: pathlib.Path,
  *,
  seed: int,
  num_samples: int,
  max_new_tokens: int,
  slots: int,
  sampler: decode.Sampler = decode.ANCESTRAL,
  first_number: int = 0,
  answers_a_shard: int = TRAJECTORIES_A_SHARD,
) -> Collected:
  """Samples answers to problems, grades them and keeps them in a folder.

  Blank answers and those that were cut off are kept too. A blank answer is a
  legal failure: it counts in the success rate, and what it teaches is not to
  end at once. On several hosts, which share the folder, every process calls
  this with the same arguments.

  Args:
    policy: what is sampled from.
    problems: n of them, with ids that differ.
    task: grades the answers.
    codec: makes prompts of problems and text of tokens.
    config: the policy's architecture.
    folder: of the shards 00000.jsonl, 00001.jsonl, ...; answers that are there
      are not sampled again.
    seed: of the draws.
    num_samples: answers a problem.
    max_new_tokens: most tokens of an answer.
    slots: answers that grow at the same time.
    sampler: how tokens are drawn.
    first_number: the number of the first problem, on which draws depend.
    answers_a_shard: at most so many are lost by a kill.

  Raises:
    ConfigError: if the folder holds an answer that was not asked for, or ids
      are not unique.
  """
  names = [
    f"{problem.id}/{sample}"
    for problem in problems
    for sample in range(num_samples)
  ]
  shards = Shards(folder, names, a_shard=answers_a_shard)
  done = len(shards.done)
  requests = [
    decode.Request(
      prompt,
      first_number + number,
      [
        sample
        for sample in range(num_samples)
        if number * num_samples + sample not in shards.done
      ],
      sampler,
      max_new_tokens,
    )
    for number, prompt in enumerate(codec.prompts(problems))
  ]
  usage, started, grading = decode.Usage(), time.monotonic(), 0.0
  waiting: list[decode.Answer] = []
  with Progress(
    len(names),
    "collect",
    unit="answer",
    initial=done,
    enabled=hosts.is_chief(),
  ) as progress:
    answers = decode.answer_requests(
      policy,
      requests,
      jax.random.key(seed),
      config,
      eos_ids=codec.end_ids,
      slots=slots,
      usage=usage,
    )
    left = len(names) - done
    for count, answer in enumerate(answers, 1):
      waiting.append(answer)
      progress.update(1)
      if len(waiting) < answers_a_shard and count < left:
        continue
      begun = time.monotonic()
      for trajectory in graded_trajectories(waiting, problems, task, codec):
        shards.add(trajectory)
      waiting = []
      grading += time.monotonic() - begun
  shards.flush()
  seconds = time.monotonic() - started - grading
  return Collected(shards.in_order(), usage, seconds)


def graded_trajectories(
  answers: Sequence[decode.Answer],
  problems: Sequence[Problem],
  task: Task,
  codec: Codec,
) -> list[data.Trajectory]:
  """Returns answers as graded trajectories, in their order.

  Args:
    answers: to grade, the same on every process.
    problems: of which `Answer.request` counts.
    task: grades the answers.
    codec: makes text of tokens.
  """
  texts = [codec.text(answer.text_tokens) for answer in answers]
  asked = [problems[answer.request] for answer in answers]
  finished = [answer.finished for answer in answers]
  rewards = grade_texts(task, asked, texts, np.array(finished))
  return [
    codec.trajectory(
      problem,
      text,
      float(reward),
      id=f"{problem.id}/{answer.sample}",
      truncated=not answer.finished,
      sampled=(data.Sampled(answer.tokens.tolist(), answer.logps.tolist()),),
    )
    for problem, text, reward, answer in zip(
      asked, texts, rewards, answers, strict=True
    )
  ]
