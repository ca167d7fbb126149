"""Worker processes that compare answers, each answer under a hard limit.

The workers are fresh interpreters, never forks: the parent runs jax, which has
threads. They start when first needed. One that takes too long is killed, one
that dies is replaced, and the answer it had at hand counts as not equal.

Too long is a matter of processor time, which the worker's own timer measures:
the same answer gets the same label however busy the machine is. The limit in
wall time only frees a worker that neither works nor dies.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from typing import IO, cast

_START_S = 120.0  # importing sympy on a busy machine
_PROGRAM = pathlib.Path(__file__).with_name("worker.py")


class _Worker:
  """A process, what it has at hand and until when."""

  def __init__(self, cpu_s: float, wall_s: float, memory_mb: int) -> None:
    # -P keeps this folder, whose modules have common names, off its path.
    limits = map(str, (cpu_s, wall_s, memory_mb))
    self.process = subprocess.Popen(
      [sys.executable, "-P", str(_PROGRAM), *limits],
      # The order of sympy's sets, and so its time, must not depend on chance.
      env=os.environ | {"PYTHONHASHSEED": "0"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )
    # Never None, as both were asked to be pipes.
    self.input = cast(IO[bytes], self.process.stdin)
    self.output = cast(IO[bytes], self.process.stdout)
    self.is_ready = False
    self.job: int | None = None
    self.deadline = time.monotonic() + _START_S
    self.jobs_done = 0
    self._unread = b""

  def send(self, job: int, reference: str, answer: str, limit_s: float) -> None:
    line = json.dumps({"reference": reference, "answer": answer}) + "\n"
    self.input.write(line.encode())
    self.input.flush()
    self.job, self.deadline = job, time.monotonic() + limit_s

  def receive(self) -> list[dict] | None:
    """Returns the replies that came, None if the process is gone."""
    data = os.read(self.output.fileno(), 65536)
    if not data:
      return None
    *lines, self._unread = (self._unread + data).split(b"\n")
    return [json.loads(line) for line in lines]

  def stop(self) -> None:
    self.process.kill()
    self.process.wait()
    self.output.close()
    try:
      self.input.close()
    except BrokenPipeError:
      pass


class GraderPool:
  """Compares pairs of answers in worker processes; see the module docstring.

  Attributes:
    started: how many processes were started so far.
  """

  def __init__(
    self,
    *,
    workers: int,
    timeout_s: float,
    memory_mb: int,
    jobs_per_worker: int = 1000,
    wall_s: float | None = None,
  ) -> None:
    """Makes a pool without starting a process.

    Args:
      workers: most processes at a time.
      timeout_s: processor time an answer may take.
      memory_mb: address space a worker may use.
      jobs_per_worker: a worker is replaced after so many answers, so that
        what sympy caches does not pile up.
      wall_s: wall time an answer may take; by default a minute and twenty
        times `timeout_s`, more than any load should ask for.
    """
    for name, value in (("workers", workers), ("timeout_s", timeout_s)):
      if not value > 0:
        raise ValueError(f"{name} must be positive; got {value}")
    self._cpu_s = timeout_s
    self._wall_s = 60 + 20 * timeout_s if wall_s is None else wall_s
    self._memory_mb = memory_mb
    self._most = workers
    self._jobs_per_worker = jobs_per_worker
    self._workers: set[_Worker] = set()
    self._close = weakref.finalize(self, _stop_all, self._workers)
    self.started = 0

  def compare(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Compares (reference, answer) pairs.

    Returns:
      For each pair `equal`, `different`, or how its worker failed: `timeout`
      (too much processor time), `stalled` (too much wall time without it),
      `crash` or `error`.

    Raises:
      RuntimeError: if no worker can be started at all.
    """
    waiting = collections.deque(range(len(pairs)))
    outcomes = [""] * len(pairs)
    try:
      while waiting or any(w.job is not None for w in self._workers):
        self._hand_out(waiting, pairs)
        for worker in self._wait():
          job, outcome = worker.job, self._hear(worker)
          if outcome and job is not None:
            outcomes[job] = outcome
    except BaseException:  # Ctrl-C too
      # Otherwise the next call would hear the answers to this call's jobs.
      self.close()
      raise
    return outcomes

  def close(self) -> None:
    """Ends all processes; the pool starts new ones if it is used again."""
    _stop_all(self._workers)

  def _hand_out(
    self,
    waiting: collections.deque[int],
    pairs: Sequence[tuple[str, str]],
  ) -> None:
    """Starts the workers that are missing and gives each idle one a job."""
    busy = sum(worker.job is not None for worker in self._workers)
    wanted = min(self._most, busy + len(waiting))
    while len(self._workers) < wanted:
      # The worker's own alarm is for the case that this process is gone.
      worker = _Worker(self._cpu_s, self._wall_s + 1, self._memory_mb)
      self._workers.add(worker)
      self.started += 1
    for worker in list(self._workers):
      if waiting and worker.is_ready and worker.job is None:
        try:
          worker.send(waiting[0], *pairs[waiting[0]], self._wall_s)
          waiting.popleft()
        except BrokenPipeError:
          # It died while it was idle; the next round starts another.
          self._drop(worker)

  def _wait(self) -> list[_Worker]:
    """Waits for a reply or a deadline; returns the workers concerned."""
    with selectors.DefaultSelector() as selector:
      concerned = [
        worker
        for worker in self._workers
        if worker.job is not None or not worker.is_ready
      ]
      if not concerned:
        return []
      for worker in concerned:
        selector.register(worker.output, selectors.EVENT_READ, worker)
      first = min(worker.deadline for worker in concerned)
      events = selector.select(max(first - time.monotonic(), 0))
      heard = [key.data for key, _ in events]
    now = time.monotonic()
    late = [w for w in concerned if w.deadline <= now and w not in heard]
    return heard + late

  def _hear(self, worker: _Worker) -> str:
    """Takes in what a worker said or failed to say; returns the outcome."""
    if worker.deadline <= time.monotonic() and not _has_data(worker):
      self._drop(worker)
      if not worker.is_ready:
        raise RuntimeError(f"a grader did not start within {_START_S:.0f} s")
      return "stalled"
    replies = worker.receive()
    if replies is None:
      self._drop(worker)
      if not worker.is_ready:
        raise RuntimeError(
          f"a grader ended with code {worker.process.returncode} at its start"
        )
      died_of_timer = worker.process.returncode == -signal.SIGPROF
      return "timeout" if died_of_timer else "crash"
    outcome = ""
    for reply in replies:
      if "missing" in reply:
        self._drop(worker)
        raise RuntimeError(
          f"grading needs math-verify ({reply['missing']}); "
          "pip install 'oreo_jax[math]'"
        )
      if "ready" in reply:
        worker.is_ready = True
        continue
      worker.job = None
      worker.jobs_done += 1
      if "error" in reply:
        outcome = "error"
      else:
        outcome = "equal" if reply["equal"] else "different"
      if "error" in reply or worker.jobs_done >= self._jobs_per_worker:
        self._drop(worker)
    return outcome

  def _drop(self, worker: _Worker) -> None:
    worker.stop()
    self._workers.discard(worker)


def _has_data(worker: _Worker) -> bool:
  with selectors.DefaultSelector() as selector:
    selector.register(worker.output, selectors.EVENT_READ)
    return bool(selector.select(0))


def _stop_all(workers: set[_Worker]) -> None:
  for worker in workers:
    worker.stop()
  workers.clear()
