"""Playing the problems of a task: to collect episodes, and as an exam."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from oreo_jax import decode, hosts
from oreo_jax.config import (
  AgentConfig,
  ConfigError,
  EvaluateConfig,
  ModelConfig,
)
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.rollout.codec import Codec
from oreo_jax.rollout.collection import Collected
from oreo_jax.rollout.episodes import Episode, Start, play_episodes
from oreo_jax.rollout.methods import Judge, Outcome
from oreo_jax.rollout.shards import Shards
from oreo_jax.tasks import Problem
from oreo_jax.tasks.environment import AgentTask
from oreo_jax.tasks.environment_pool import EnvironmentPool


class Player(NamedTuple):
  """A policy that plays, and how."""

  policy: Params
  config: ModelConfig
  codec: Codec
  task: AgentTask
  settings: AgentConfig
  seed: int
  slots: int  # episodes that are played at a time
  sampler: decode.Sampler = decode.ANCESTRAL
  actions: int = 1  # K, proposed a turn
  judge: Judge | None = None  # chooses among them; None: the likeliest

  @property
  def max_turns(self) -> int:
    """Returns the most actions of an episode."""
    return self.settings.max_turns or self.task.max_turns

  def conversations(self, count: int) -> decode.Conversations:
    """Makes slots for at most so many conversations."""
    settings, judge = self.settings, self.judge
    strategy = decode.best_of_actions(
      self.actions,
      max_steps=self.max_turns,
      max_step_tokens=settings.max_action_tokens,
      score=decode.by_logp if judge is None else decode.by_value,
    )
    plan = decode.make_plan(
      self.policy,
      None if judge is None else judge.critic,
      jax.random.key(self.seed),
      self.config,
      strategy=strategy,
      # Its end-of-turn alone ends an action.
      stops=decode.no_stops(self.config.vocab_size),
      eos_ids=self.codec.end_ids,
      max_new_tokens=settings.max_tokens,
      sampler=self.sampler,
      granularity="token" if judge is None else judge.granularity,
    )
    slots = max(min(self.slots, count), 1)
    return decode.Conversations(plan, slots, settings.max_prompt_tokens)

  def play(
    self, starts: Sequence[Start], progress: Progress
  ) -> Iterator[Episode]:
    """Plays episodes; yields them as they end."""
    conversations = self.conversations(len(starts))
    with EnvironmentPool(
      self.task.make_environment,
      slots=conversations.slots,
      workers=self.settings.workers,
      timeout_s=self.settings.timeout_s,
    ) as pool:
      for episode in play_episodes(
        starts, conversations, pool, self.codec, max_turns=self.max_turns
      ):
        progress.update(1)
        yield episode


def collect_episodes(
  player: Player,
  problems: Sequence[Problem],
  folder: pathlib.Path,
  *,
  num_samples: int,
  first_number: int = 0,
) -> tuple[Collected, dict[str, int]]:
  """Plays problems and keeps the episodes in a folder, as `collect_answers`.

  An episode that was lost with its process, or whose beginning has no room, is
  left out and counted.

  Args:
    player: plays; one action a turn.
    problems: n of them, with ids that differ.
    folder: of the shards; episodes that are there are not played again.
    num_samples: episodes a problem.
    first_number: the number of the first problem, on which draws depend.

  Returns:
    (the episodes, how many ended for each reason).

  Raises:
    ConfigError: if every episode was left out.
  """
  starts = [
    Start(
      (first_number + number) * num_samples + sample,
      problem,
      f"{problem.id}/{sample}",
    )
    for number, problem in enumerate(problems)
    for sample in range(num_samples)
  ]
  shards = Shards(folder, [start.name for start in starts])
  left = [s for place, s in enumerate(starts) if place not in shards.done]
  usage, begun = decode.Usage(), time.monotonic()
  reasons: dict[str, int] = {}
  with Progress(
    len(starts),
    "collect",
    unit="episode",
    initial=len(shards.done),
    enabled=hosts.is_chief(),
  ) as progress:
    for episode in player.play(left, progress) if left else ():
      reasons[episode.reason] = reasons.get(episode.reason, 0) + 1
      if episode.trajectory is not None:
        shards.add(episode.trajectory)
        usage.tokens += episode.tokens
  shards.flush()
  if not shards.done:
    raise ConfigError(
      f"collect: none of {len(starts)} episodes was played: {reasons}. Those "
      "that ended for tokens need --config.agent.max_prompt_tokens, those that "
      "were lost are told above"
    )
  seconds = time.monotonic() - begun
  return Collected(shards.in_order(), usage, seconds), reasons


def agent_methods(
  player: Player, label: str, problems: Sequence[Problem], exam: EvaluateConfig
) -> list[Outcome]:
  """Plays problems greedily, with one sample, and with the best of K actions.

  Args:
    player: its sampler draws what is not greedy; without a judge there are no
      K actions to choose from.
    label: of the policy.
    problems: of the exam.
    exam: `budgets` are the K.
  """
  ways: list[tuple[str, str, Player]] = [
    ("greedy", "greedy", player._replace(sampler=decode.GREEDY, judge=None)),
    ("sample", "one sample", player._replace(judge=None)),
  ]
  if player.judge is not None:
    ways += [
      ("best_of_k", f"best of {count} actions", player._replace(actions=count))
      for count in exam.budgets
      if count > 1
    ]
  starts = [
    Start(number, problem, f"{problem.id}/0")
    for number, problem in enumerate(problems)
  ]
  outcomes = []
  for search, title, way in ways:
    begun = time.monotonic()
    with Progress(
      len(starts), f"{label}, {title}", unit="episode", enabled=hosts.is_chief()
    ) as progress:
      episodes = list(way.play(starts, progress))
    rewards = np.zeros(len(starts), np.float32)
    for episode in episodes:
      # A lost episode counts as one that failed, and is told.
      rewards[episode.start.number] = episode.reward
    tokens = way.actions * sum(episode.tokens for episode in episodes)
    outcomes.append(
      Outcome(
        f"{label}, {title}" if way.judge is None else f"{label} + {title}",
        search,
        way.actions,
        rewards,
        tokens / len(starts),
        time.monotonic() - begun,
      )
    )
  return outcomes
