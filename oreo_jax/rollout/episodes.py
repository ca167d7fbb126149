"""Episodes: a policy and an environment take turns, many of them at once.

All conversations take a turn together: the policy acts in each, the
environments answer, and what they say is read behind the text that is there
(`decode.turns`). An episode that ends makes room for the next one.

An episode is a function of the policy, the seed and its number: its draws
depend on these and on the turn, and its environment on the actions alone. So it
is the same with any number of slots and workers, and after a restart.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from oreo_jax import data, decode
from oreo_jax.data.schema import ASSISTANT
from oreo_jax.rollout.codec import Codec
from oreo_jax.settings import ConfigError
from oreo_jax.tasks import Problem
from oreo_jax.tasks.environment_pool import EnvironmentPool, Lost, Step

# Why an episode ended: by the environment, at the most turns, without room for
# more tokens, or because its process was lost.
DONE, TURNS, TOKENS, LOST = "done", "turns", "tokens", "lost"


class Start(NamedTuple):
  """An episode that is to be played."""

  number: int  # on which its draws depend
  problem: Problem
  name: str  # of its trajectory


class Episode(NamedTuple):
  """An episode that has ended."""

  start: Start
  reason: str  # DONE, TURNS, TOKENS or LOST
  # The conversation with its rewards; None if it has no action, or was lost.
  trajectory: data.Trajectory | None
  values: np.ndarray  # f32[turns], V of each action, nan without a critic

  @property
  def reward(self) -> float:
    """Returns what it earned, 0 if there is no trajectory."""
    return self.trajectory.reward if self.trajectory else 0.0

  @property
  def tokens(self) -> int:
    """Returns how many tokens its actions have, 0 without a trajectory."""
    sampled = self.trajectory.sampled if self.trajectory else None
    return sum(len(turn.tokens) for turn in sampled or ())


@dataclasses.dataclass
class _Playing:
  """An episode in flight."""

  start: Start
  turns: list[data.Turn]
  history: np.ndarray  # i32[n], all tokens so far
  actions: list[decode.Action] = dataclasses.field(default_factory=list)
  sampled: list[data.Sampled] = dataclasses.field(default_factory=list)
  rewards: list[float] = dataclasses.field(default_factory=list)

  def say(self, text: str, action: decode.Action) -> None:
    """Notes an action."""
    self.turns.append(data.Turn(ASSISTANT, text))
    self.actions.append(action)
    self.sampled.append(data.Sampled(action.tokens, action.logps))
    self.history = np.concatenate([self.history, action.tokens])

  def hear(self, observation: str, tokens: np.ndarray) -> None:
    """Notes what was answered to it."""
    self.turns.append(data.Turn("user", observation))
    self.history = np.concatenate([self.history, tokens])

  def trajectory(self) -> data.Trajectory:
    """Returns the conversation up to its last action."""
    total = sum(self.rewards)
    # One reward at the end is the usual case, and is written so.
    at_end = not any(self.rewards[:-1])
    return data.Trajectory(
      turns=tuple(self.turns),
      reward=total,
      turn_rewards=None if at_end else tuple(self.rewards),
      problem=self.start.problem.id,
      id=self.start.name,
      truncated=not self.actions[-1].finished,
      is_chat=True,
      sampled=tuple(self.sampled),
    )

  def ended(self, reason: str) -> Episode:
    """Returns the episode as it ended."""
    trajectory = None
    if reason != LOST and self.actions:
      trajectory = self.trajectory()
    values = np.array([action.value for action in self.actions], np.float32)
    return Episode(self.start, reason, trajectory, values)


def play_episodes(
  starts: Iterable[Start],
  conversations: decode.Conversations,
  pool: EnvironmentPool,
  codec: Codec,
  *,
  max_turns: int,
) -> Iterator[Episode]:
  """Yields episodes as they end.

  Args:
    starts: the episodes, with numbers that differ.
    conversations: slots of the policy, all of them free. The settings of its
      plan say how actions are drawn and chosen: K a turn by
      `decode.best_of_actions(K)`.
    pool: of environments, with as many slots as there are conversations.
    codec: makes tokens of what is said; it needs a chat template.
    max_turns: most actions of an episode.

  Raises:
    ConfigError: without a chat template, on several hosts, or if the template
      changes earlier turns when later ones follow.
  """
  if not codec.chat:
    raise ConfigError(
      "episodes are conversations, which need the tokenizer's chat template: "
      "set --config.data.chat=True"
    )
  if jax.process_count() > 1:
    raise ConfigError(
      "episodes are played by one process: environments on several hosts could "
      "be lost on some of them alone. Start one process, and collect on others "
      "with other problems (--config.collect.skip)"
    )
  queue = iter(starts)
  playing: dict[int, _Playing] = {}  # by slot
  reasons: collections.Counter[str] = collections.Counter()
  while True:
    free = [s for s in range(conversations.slots) if s not in playing]
    entering, over = _enter(queue, free, conversations, pool, codec)
    playing |= entering
    if not playing and not over:
      break
    for episode in over:
      reasons[episode.reason] += 1
      yield episode
    heard: dict[int, np.ndarray] = {}
    said: dict[int, str] = {}  # by the number of the episode
    slot_of: dict[int, int] = {}
    for slot, action in (conversations.act() if playing else {}).items():
      episode_now = playing[slot]
      end = len(action.tokens) - action.finished
      text = codec.text(action.tokens[:end])
      episode_now.say(text, action)
      said[episode_now.start.number] = text
      slot_of[episode_now.start.number] = slot
    for number, reply in pool.step(said).items():
      slot = slot_of[number]
      reason = _hear(playing[slot], reply, max_turns)
      if not reason and isinstance(reply, Step):
        chat = playing[slot].trajectory()
        tokens = codec.reply_tokens(chat, reply.observation)
        if conversations.has_room(slot, len(tokens)):
          playing[slot].hear(reply.observation, tokens)
          heard[slot] = tokens
          continue
        reason = TOKENS
      pool.end([number])
      reasons[reason] += 1
      ended = playing.pop(slot)
      episode = ended.ended(reason)
      if episode.trajectory is not None:
        codec.check_played(episode.trajectory, ended.history)
      yield episode
    conversations.observe(heard)
  if reasons[LOST]:
    logging.warning(
      "%d of %d episodes were lost with their process: %s",
      reasons[LOST],
      sum(reasons.values()),
      dict(pool.lost),
    )


def _enter(
  queue: Iterator[Start],
  free: list[int],
  conversations: decode.Conversations,
  pool: EnvironmentPool,
  codec: Codec,
) -> tuple[dict[int, _Playing], list[Episode]]:
  """Begins as many episodes as slots are free.

  Returns:
    (the episodes by their slots, those that were over at once).
  """
  starts = [start for _, start in zip(free, queue, strict=False)]
  replies = pool.start({start.number: start.problem for start in starts})
  entering: dict[int, _Playing] = {}
  over: list[Episode] = []
  slots = iter(free)
  for start in starts:
    reply = replies[start.number]
    if isinstance(reply, Lost):
      over.append(_Playing(start, [], np.zeros(0, np.int32)).ended(LOST))
      continue
    turns = [data.Turn("user", reply.observation)]
    tokens = data.tokenize_prompt(turns, codec.tokenizer)
    if len(tokens) > conversations.prompt_room:
      pool.end([start.number])
      over.append(_Playing(start, turns, tokens).ended(TOKENS))
      continue
    entering[next(slots)] = _Playing(start, turns, tokens)
  if entering:
    conversations.begin(
      list(entering),
      [each.history for each in entering.values()],
      [each.start.number for each in entering.values()],
    )
  return entering, over


def _hear(playing: _Playing, reply: Step | Lost, max_turns: int) -> str:
  """Notes what an action earned; returns why the episode is over, if it is."""
  if isinstance(reply, Lost):
    return LOST
  playing.rewards.append(float(reply.reward))
  if reply.done:
    return DONE
  return TURNS if len(playing.actions) >= max_turns else ""
