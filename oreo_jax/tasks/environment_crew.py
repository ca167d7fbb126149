"""The worker processes of `environment_pool`, and who is at what.

A worker has one command at a time, so it is always known which episode it was
at when it died or took too long.
"""

from __future__ import annotations

import collections
import selectors
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from oreo_jax.tasks.environment import Environment
from oreo_jax.tasks.environment_process import EnvironmentProcess


class Lost(NamedTuple):
  """Says that an episode is over because its environment failed.

  Attributes:
    kind: `error` (it raised), `timeout` (no answer in time), `crash` (its
      process died), or `start` (no new process could be started).
    reason: what happened, for people.
  """

  kind: str
  reason: str


class Worker:
  """The place of a worker, which outlives the process that fills it.

  Attributes:
    taken: slots that belong to an episode.
    held: slots whose environment is where its episode is.
  """

  def __init__(self) -> None:
    self.taken: set[int] = set()
    self.held: set[int] = set()
    self.process: EnvironmentProcess | None = None
    self.waiting: collections.deque[int] = collections.deque()  # episodes
    self.current: int | None = None  # the episode whose command it has

  def take_slot(self) -> int:
    """Returns a free slot, which now belongs to a new episode."""
    slot = min(set(range(len(self.taken) + 1)) - self.taken)
    self.taken.add(slot)
    return slot

  def free_slot(self, slot: int) -> None:
    """Gives a slot back, whatever state its environment is in."""
    self.taken.discard(slot)
    self.held.discard(slot)

  def kill(self) -> None:
    """Kills the process, and with it the state of all environments."""
    if self.process is not None:
      self.process.kill()
    self.process = None
    self.held.clear()


class Crew:
  """Workers, and the loop that keeps all of them busy.

  Attributes:
    workers: the places of the workers.
    started: how many processes were started so far.
  """

  def __init__(
    self,
    make_environment: Callable[[], Environment],
    *,
    workers: int,
    timeout_s: float,
    start_timeout_s: float,
  ) -> None:
    """Makes places for workers; the arguments are those of the pool."""
    self.workers = [Worker() for _ in range(workers)]
    self.started = 0
    self._make_environment = make_environment
    self._timeout_s = timeout_s
    self._start_timeout_s = start_timeout_s
    self._was_ready = False
    self._finalize = weakref.finalize(self, _stop_all, self.workers)

  def ask(
    self,
    episodes: Mapping[int, Worker],
    make_command: Callable[[int], dict[str, Any]],
  ) -> Iterator[tuple[int, dict[str, Any] | Lost]]:
    """Has one command carried out for each of some episodes.

    Args:
      episodes: the worker of each.
      make_command: returns the command for an episode, as
        `environment_worker.Games.answer` takes it; asked when the worker is
        about to get it.

    Yields:
      The number of an episode and what was answered, or how it was lost, as
      soon as it is known.

    Raises:
      RuntimeError: no worker could be started at all.
    """
    for number, worker in episodes.items():
      worker.waiting.append(number)
    left = len(episodes)
    while left:
      for worker in self.workers:
        if worker.current is None and worker.waiting:
          self._hand_out(worker, make_command)
      for worker in self._wait():
        reply = self._hear(worker)
        if reply is not None and worker.current is not None:
          number, worker.current = worker.current, None
          left -= 1
          yield number, reply

  def stop(self) -> None:
    """Ends all processes, and forgets what they were asked."""
    _stop_all(self.workers)

  def _hand_out(
    self, worker: Worker, make_command: Callable[[int], dict[str, Any]]
  ) -> None:
    """Gives an idle worker its next command."""
    if worker.process is not None and worker.process.has_died_idle():
      worker.kill()
    if worker.process is None:
      self.started += 1
      worker.process = EnvironmentProcess(
        self._make_environment, start_s=self._start_timeout_s
      )
    number = worker.current = worker.waiting.popleft()
    command = make_command(number)
    turns = len(command["actions"]) + (command["problem"] is not None)
    worker.process.send(command, limit_s=self._timeout_s * max(turns, 1))

  def _wait(self) -> list[Worker]:
    """Waits for replies or a deadline; returns the workers concerned."""
    busy = [
      (worker, worker.process)
      for worker in self.workers
      if worker.current is not None and worker.process is not None
    ]
    with selectors.DefaultSelector() as selector:
      for worker, process in busy:
        selector.register(process.output, selectors.EVENT_READ, worker)
        if process.outbox:
          selector.register(process.input, selectors.EVENT_WRITE, worker)
      first = min(process.deadline for _, process in busy)
      events = selector.select(max(first - time.monotonic(), 0))
    heard = []
    for key, event in events:
      if event == selectors.EVENT_WRITE:
        key.data.process.write()
      else:
        heard.append(key.data)
    now = time.monotonic()
    late = [w for w, p in busy if p.deadline <= now and w not in heard]
    return heard + late

  def _hear(self, worker: Worker) -> dict[str, Any] | Lost | None:
    """Takes in what a worker said or failed to say; None if it is to go on."""
    process = worker.process
    if process is None:
      return None
    reply = process.receive()
    if reply is not None and "failed" in reply:
      # It died, or is too late, or could not make an environment.
      worker.kill()
      kind, reason = reply.get("kind", "crash"), reply["failed"]
      if kind == "crash":
        reason += process.describe_end()
      if not process.is_ready and not self._was_ready:
        raise RuntimeError(
          f"a worker for environments could not be started: {reason}. What "
          "makes the environment must be in a module that a new process can "
          "import; workers=0 plays in this process"
        )
      return Lost(kind if process.is_ready else "start", reason)
    self._was_ready |= process.is_ready
    return reply


def _stop_all(workers: Sequence[Worker]) -> None:
  """Ends all processes: tells all of them first, then waits for each."""
  processes = [w.process for w in workers if w.process is not None]
  for worker in workers:
    if worker.current is not None and worker.process is not None:
      worker.kill()  # It is in the middle of something.
    worker.process = worker.current = None
    worker.held.clear()
    worker.waiting.clear()
  for process in processes:
    process.hang_up()
  for process in processes:
    process.end()
