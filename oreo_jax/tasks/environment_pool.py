"""Many episodes at once, in worker processes that may crash or hang.

Real engines are not thread-safe, crash, and now and then never return. So each
lives in a worker process, a fresh interpreter that loads no jax. A worker that
dies or takes too long is killed and replaced. The episode whose action it had
at hand is lost, which is an answer and no exception; the other episodes it held
are restored by playing their actions again, unseen by the caller.

Without workers the same calls play in this process: right for environments of
pure Python, which neither crash nor hang.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from absl import logging

from oreo_jax.tasks.environment import Environment, Step
from oreo_jax.tasks.environment_crew import Crew, Lost, Worker
from oreo_jax.tasks.environment_worker import Games
from oreo_jax.tasks.task import Problem


@dataclasses.dataclass
class _Episode:
  """An episode in flight and what it takes to restore it."""

  problem: Problem
  worker: Worker
  slot: int
  played: list[str]  # the actions that were answered
  observation: str | None = None  # the last one

  @property
  def is_held(self) -> bool:
    """Says whether an environment is in the state of the episode."""
    return self.slot in self.worker.held


class _Request(NamedTuple):
  """What one episode is asked to do next."""

  actions: Sequence[str] = ()
  list_actions: bool = False


class EnvironmentPool:
  """Plays episodes, each known by a number that the caller chooses.

  The number of workers changes no answer, as long as environments keep to what
  `Environment` asks for.

  Attributes:
    slots: most episodes in flight at a time.
    lost: how many episodes were lost so far, by kind (see `Lost`).
  """

  def __init__(
    self,
    make_environment: Callable[[], Environment],
    *,
    slots: int,
    workers: int = 0,
    timeout_s: float = 60.0,
    start_timeout_s: float = 120.0,
  ) -> None:
    """Makes a pool; processes start when first needed.

    Args:
      make_environment: such as `AgentTask.make_environment`. With workers it
        must be picklable, and defined in a module that they can import: not in
        the program itself (`__main__`).
      slots: most episodes in flight. A worker holds up to `slots / workers`,
        rounded up, each in an environment of its own.
      workers: processes; 0 plays in this one, without any limit of time. An
        engine that can only hold one game a process needs as many as `slots`.
      timeout_s: wall time that a worker may take for one `reset` or `step`.
      start_timeout_s: wall time until a new worker must be ready.

    Raises:
      ValueError: a number is out of range.
    """
    if slots < 1:
      raise ValueError(f"slots must be at least 1; got {slots}")
    if workers < 0:
      raise ValueError(f"workers must be 0 or more; got {workers}")
    for name, value in (
      ("timeout_s", timeout_s),
      ("start_timeout_s", start_timeout_s),
    ):
      if not value > 0:
        raise ValueError(f"{name} must be positive; got {value}")
    self.slots = slots
    self.lost: collections.Counter[str] = collections.Counter()
    # Without workers, the place of one stands for this process.
    self._games = None if workers else Games(make_environment)
    self._crew = Crew(
      make_environment,
      workers=max(1, min(workers, slots)),
      timeout_s=timeout_s,
      start_timeout_s=start_timeout_s,
    )
    self._episodes: dict[int, _Episode] = {}

  def __enter__(self) -> Self:
    """Returns the pool, to be closed at the end of a `with` block."""
    return self

  def __exit__(self, *unused: object) -> None:
    """Closes the pool."""
    self.close()

  @property
  def started(self) -> int:
    """How many processes were started so far."""
    return self._crew.started

  @property
  def free(self) -> int:
    """How many more episodes can be started now."""
    return self.slots - len(self._episodes)

  def start(
    self,
    problems: Mapping[int, Problem],
    *,
    after: Mapping[int, Sequence[str]] | None = None,
  ) -> dict[int, Step | Lost]:
    """Begins episodes.

    Args:
      problems: by the number of the episode, which must not be in flight.
      after: actions that were taken before, to go on from there: a restart, or
        a branch of another episode.

    Returns:
      For each episode its first observation, as a step without reward (or what
      the last action of `after` led to), or how it was lost.

    Raises:
      ValueError: the number is in flight already, or no slot is free.
      RuntimeError: no worker could be started at all.
    """
    if len(problems) > self.free:
      raise ValueError(
        f"cannot start {len(problems)} episodes: {self.free} of {self.slots} "
        "slots are free"
      )
    again = self._episodes.keys() & problems.keys()
    if again:
      raise ValueError(f"episodes {sorted(again)} are in flight already")
    requests = {}
    for number, problem in problems.items():
      worker = min(self._crew.workers, key=lambda worker: len(worker.taken))
      self._episodes[number] = _Episode(problem, worker, worker.take_slot(), [])
      requests[number] = _Request((after or {}).get(number, ()))
    return self._last_steps(requests)

  def step(self, actions: Mapping[int, str]) -> dict[int, Step | Lost]:
    """Takes one action in each of some episodes.

    An episode that is done or lost leaves its slot.

    Args:
      actions: by the number of the episode.

    Returns:
      For each episode what its environment answered, or how it was lost.

    Raises:
      ValueError: an episode is not in flight.
      RuntimeError: no worker could be started at all.
    """
    return self._last_steps(
      {number: _Request([action]) for number, action in actions.items()}
    )

  def actions(
    self, episodes: Iterable[int]
  ) -> dict[int, list[str] | None | Lost]:
    """Lists the possible actions of episodes, None where nobody knows them.

    Raises:
      ValueError: an episode is not in flight.
      RuntimeError: no worker could be started at all.
    """
    request = _Request(list_actions=True)
    replies = self._ask(dict.fromkeys(episodes, request))
    return {
      number: reply if isinstance(reply, Lost) else reply["actions"]
      for number, reply in replies.items()
    }

  def end(self, episodes: Iterable[int]) -> None:
    """Gives up episodes, as when a limit of turns is reached.

    Those that are not in flight are passed over.
    """
    for number in episodes:
      episode = self._episodes.pop(number, None)
      if episode is not None:
        episode.worker.free_slot(episode.slot)

  def close(self) -> None:
    """Ends all processes and gives up all episodes.

    The pool starts new processes if it is used again.
    """
    self.end(list(self._episodes))
    self._crew.stop()
    if self._games is not None:
      self._games.close()

  def _last_steps(
    self, requests: Mapping[int, _Request]
  ) -> dict[int, Step | Lost]:
    """Has actions taken; returns the last step of each episode."""
    last: dict[int, Step | Lost] = {}
    for number, reply in self._ask(requests).items():
      if isinstance(reply, Lost):
        last[number] = reply
        continue
      last[number] = step = Step(*reply["steps"][-1])
      if step.done:
        self.end([number])
    return last

  def _ask(
    self, requests: Mapping[int, _Request]
  ) -> dict[int, dict[str, Any] | Lost]:
    """Carries out requests; an episode that is lost leaves its slot."""
    unknown = requests.keys() - self._episodes.keys()
    if unknown:
      raise ValueError(
        f"episodes {sorted(unknown)} are not in flight: they were not started, "
        "or are done or lost"
      )
    replies = {}
    try:
      for number, reply in self._answers(requests):
        replies[number] = self._judge(number, requests[number], reply)
    except BaseException:  # Ctrl-C too
      # Otherwise the next call would hear the answers to this call's requests.
      self._crew.stop()
      for worker in self._crew.workers:
        worker.held.clear()
      raise
    # In the order of the requests, whoever answered first.
    return {number: replies[number] for number in requests}

  def _answers(
    self, requests: Mapping[int, _Request]
  ) -> Iterator[tuple[int, dict[str, Any] | Lost]]:
    """Yields what is answered to requests, in any order."""

    def command(number: int) -> dict[str, Any]:
      return self._command(self._episodes[number], requests[number])

    if self._games is None:
      workers = {number: self._episodes[number].worker for number in requests}
      yield from self._crew.ask(workers, command)
      return
    for number in requests:
      yield number, self._games.answer(command(number))

  def _command(self, episode: _Episode, request: _Request) -> dict[str, Any]:
    """Returns what to tell a process; all of the episode, if it is not held."""
    held = episode.is_held
    return {
      "slot": episode.slot,
      "problem": None if held else episode.problem,
      "actions": [*([] if held else episode.played), *request.actions],
      "list_actions": request.list_actions,
    }

  def _judge(
    self, number: int, request: _Request, reply: dict[str, Any] | Lost
  ) -> dict[str, Any] | Lost:
    """Enters a reply into the episode; says it if the episode is lost."""
    episode = self._episodes[number]
    if not isinstance(reply, Lost):
      reply = _check(episode, request, reply)
    if isinstance(reply, Lost):
      self.lost[reply.kind] += 1
      logging.warning(
        "episode %d (problem %s) is lost: %s: %s",
        number,
        episode.problem.id,
        reply.kind,
        reply.reason,
      )
      self.end([number])
      return reply
    episode.worker.held.add(episode.slot)
    episode.played += request.actions
    if reply["steps"]:
      episode.observation = reply["steps"][-1][0]
    return reply


def _check(
  episode: _Episode, request: _Request, reply: dict[str, Any]
) -> dict[str, Any] | Lost:
  """Returns the reply if the episode can go on with it."""
  if "error" in reply:
    return Lost("error", reply["error"])
  restored = not episode.is_held and episode.observation is not None
  before = len(reply["steps"]) - len(request.actions) - 1
  if restored and (
    before != len(episode.played)
    or reply["steps"][before][0] != episode.observation
  ):
    return Lost(
      "error",
      "its process died, and the same actions led elsewhere when they were "
      "played again: what an environment says must be a function of the "
      "problem and the actions",
    )
  return reply
