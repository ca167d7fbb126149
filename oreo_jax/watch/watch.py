"""The connections of the watch, and the thread that keeps it."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from oreo_jax.settings import ConfigError
from oreo_jax.watch.judge import Peer, Timeouts, Verdict, judge

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class _Line:
  """A connection on which both sides write JSON, a message a line."""

  def __init__(self, connection: socket.socket):
    """Takes the connection over."""
    connection.settimeout(10.0)
    self.socket = connection
    self._received = b""
    self._waiting: list[dict[str, Any]] = []  # came with the first one
    self._sending = threading.Lock()

  def send(self, **message: Any) -> None:
    """Sends a message; nobody hears it when the connection has closed."""
    data = json.dumps(message).encode() + b"\n"
    try:
      with self._sending:
        self.socket.sendall(data)
    except OSError:
      pass  # the reader of this side notices it

  def first(self) -> dict[str, Any]:
    """Waits for the first message of a connection and returns it."""
    while not self._waiting:
      self._waiting = self.receive()
    return self._waiting.pop(0)

  def receive(self) -> list[dict[str, Any]]:
    """Returns the messages that have come; EOFError when it has closed."""
    try:
      data = self.socket.recv(1 << 16)
    except OSError as error:
      raise EOFError from error
    if not data:
      raise EOFError
    *lines, self._received = (self._received + data).split(b"\n")
    waiting, self._waiting = self._waiting, []
    return waiting + [json.loads(line) for line in lines]


class Watch:
  """The watch of one process; a thread of its own keeps it.

  Between `meet` and `leave` the process ends when the run has to.
  """

  def __init__(
    self,
    address: tuple[str, int],
    count: int,
    process: int,
    timeouts: Timeouts,
  ):
    """Does nothing yet.

    Args:
      address: host of process 0, and a port that is free there.
      count: how many processes there are.
      process: which one this is.
      timeouts: when waiting ends.
    """
    self._address = address
    self._count = count
    self._timeouts = timeouts
    self._interval = min(2.0, timeouts.silence / 4, timeouts.hang / 4)
    self._me = Peer(process, socket.gethostname(), time.monotonic())
    self._peers: dict[int, Peer] = {process: self._me}
    # To the others; one that is not process 0 has a line to process 0 alone.
    self._lines: dict[int, _Line] = {}
    self._event = "the start"
    self._computed, self._counted = 0.0, 0  # at the last look
    self._moved = time.monotonic()
    self._lock = threading.Lock()
    self._asking = False  # whether the main thread waits for the verdict
    self._verdict: Verdict | None = None
    self._over = threading.Event()  # there is a verdict
    self._all_ended = threading.Event()

  # --- The start.

  def meet(self) -> list[str]:
    """Returns the hosts of all processes once they have come.

    Raises:
      ConfigError: if they do not come in time or do not fit together.
    """
    deadline = time.monotonic() + self._timeouts.start
    if self._me.process == 0:
      self._gather(deadline)
      hosts = [self._peers[process].host for process in range(self._count)]
      for line in self._lines.values():
        line.send(hosts=hosts)
    else:
      hosts = self._join(deadline)
    now = time.monotonic()
    for process, host in enumerate(hosts):
      self._peers.setdefault(process, Peer(process, host, now)).heard = now
    self._moved = now
    threading.Thread(target=self._keep, name="watch", daemon=True).start()
    return hosts

  def _gather(self, deadline: float) -> None:
    with _listen(self._address[1]) as server:
      while len(self._peers) < self._count:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
          line = _Line(server.accept()[0])
        except TimeoutError:
          self._refuse(self._missing())
        try:
          hello = line.first()
          process, count = int(hello["process"]), int(hello["count"])
          host = str(hello["host"])
        except (EOFError, ValueError, KeyError, TypeError):
          continue  # somebody who scans ports
        self._lines.setdefault(process, line)
        if count != self._count:
          self._refuse(
            f"process {process} on host {host} was told of {count} processes, "
            f"process 0 of {self._count}: give all the same --num_processes"
          )
        if process in self._peers or not 0 < process < self._count:
          taken = self._peers.get(process)
          also = f", as does host {taken.host}" if taken else ""
          line.send(refused=f"--process_id={process} is not free")
          self._refuse(
            f"host {host} says it is process {process} of {self._count}{also}: "
            f"give each process a --process_id of its own, 0 to "
            f"{self._count - 1}"
          )
        self._peers[process] = Peer(process, host, time.monotonic())

  def _missing(self) -> str:
    missing = sorted({*range(self._count)} - {*self._peers})
    names = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
    come = ", ".join(peer.name for peer in self._peers.values())
    return (
      f"only {len(self._peers)} of {self._count} processes came within "
      f"{self._timeouts.start:.0f} s (--start_timeout): missing {names}; "
      f"there are {come}. Check that all were started, with the same "
      "coordinator"
    )

  def _refuse(self, reason: str) -> None:
    for line in self._lines.values():
      line.send(refused=reason)
    raise ConfigError(reason)

  def _join(self, deadline: float) -> list[str]:
    """Asks process 0 until it answers; it may not be up yet."""
    host, port = self._address
    problem: Exception = TimeoutError("no answer")
    while time.monotonic() < deadline:
      try:
        line = _Line(socket.create_connection((host, port), timeout=5.0))
        line.send(
          process=self._me.process, host=self._me.host, count=self._count
        )
        line.socket.settimeout(max(deadline + 5.0 - time.monotonic(), 0.01))
        answer = line.first()
      except (OSError, EOFError) as error:
        problem = error
        time.sleep(min(0.5, self._interval))
        continue
      if "refused" in answer:
        raise ConfigError(answer["refused"])
      line.socket.settimeout(10.0)
      self._lines[0] = line
      return answer["hosts"]
    raise ConfigError(
      f"process {self._me.process} of {self._count} did not reach process 0 at "
      f"{host}:{port} within {self._timeouts.start:.0f} s (--start_timeout): "
      f"{problem or type(problem).__name__}. Check that process 0 was started, "
      "that this host can resolve and reach that name, and that no firewall "
      "closes the port"
    )

  # --- What the main thread says.

  def mark(self, event: str) -> None:
    """Notes that the main thread has come to an event that all come to."""
    self._me.count += 1
    self._event = event

  def leave(self) -> None:
    """Says that all work is done, and waits until it is done everywhere."""
    self._me.ended = True
    for line in self._lines.values():
      line.send(ended=True)
    self._all_ended.wait()

  def fail(self, code: int, message: str) -> Verdict:
    """Says that this process has failed; returns what the run ends with."""
    with self._lock:
      self._asking = True
      self._me.failure, self._me.failed_at = (code, message), time.monotonic()
    for line in self._lines.values():
      line.send(failure=[code, message])
    patience = self._timeouts.silence + self._timeouts.grace + 10.0
    self._over.wait(patience)
    return self._verdict or Verdict(code, message, self._me.process)

  # --- The thread.

  def _keep(self) -> None:
    selector = selectors.DefaultSelector()
    for process, line in self._lines.items():
      selector.register(line.socket, selectors.EVENT_READ, process)
    beat = 0.0
    while not self._over.is_set():
      for key, _ in selector.select(timeout=self._interval / 2):
        peer = self._peers[key.data]
        try:
          for message in self._lines[peer.process].receive():
            self._hear(peer, message)
        except EOFError:
          peer.lost = True
          selector.unregister(key.fileobj)
      now = time.monotonic()
      if now - beat > self._interval:
        beat = now
        self._look_at_myself(now)
        me = self._me
        for line in self._lines.values():
          line.send(still=me.still, count=me.count, place=me.place)
      watched = list(self._peers.values())
      if self._me.process != 0:
        # Whether process 0 is there; all else is judged by process 0.
        chief = self._peers[0]
        watched = [dataclasses.replace(chief, failure=None, still=0.0)]
      elif not self._all_ended.is_set() and all(p.ended for p in watched):
        for line in self._lines.values():
          line.send(all_ended=True)
        self._all_ended.set()
      self._me.heard = now
      if not self._all_ended.is_set():
        verdict = judge(watched, now, self._timeouts)
        if verdict:
          self._end(verdict)

  def _hear(self, peer: Peer, message: dict[str, Any]) -> None:
    peer.heard = time.monotonic()
    if "verdict" in message:
      self._end(Verdict(*message["verdict"]))
    elif "failure" in message:
      peer.failure, peer.failed_at = tuple(message["failure"]), peer.heard
    elif "ended" in message:
      peer.ended = True
    elif "all_ended" in message:
      self._all_ended.set()
    elif "still" in message:
      peer.still, peer.count = message["still"], message["count"]
      peer.place = message["place"]

  def _look_at_myself(self, now: float) -> None:
    """Notes whether the main thread has moved since the last look.

    It has when it came to an event or has computed. Where it is says little:
    Python lets other threads look at few places of a loop, so a loop that goes
    round can look as if it stood still.
    """
    thread = threading.main_thread().ident or 0
    computed = time.clock_gettime(time.pthread_getcpuclockid(thread))
    # A thread that waits wakes now and then, for less than this.
    if computed - self._computed > 1e-3 or self._me.count != self._counted:
      self._moved = now
    self._computed, self._counted = computed, self._me.count
    self._me.still = now - self._moved
    self._me.place = self._place(sys._current_frames().get(thread))

  def _place(self, frame: FrameType | None) -> str:
    """Returns the last event, and the line of the package it is at now."""
    while frame and not _is_ours(frame.f_code.co_filename):
      frame = frame.f_back
    if frame is None:
      return self._event
    name = frame.f_code.co_filename.removeprefix(_PACKAGE)
    return f"{self._event} ({name}:{frame.f_lineno})"

  def _end(self, verdict: Verdict) -> None:
    """Tells the others, and ends this process if its main thread does not."""
    self._verdict = verdict
    if self._me.process == 0:
      for line in self._lines.values():
        line.send(verdict=list(verdict))
      self._wait_for_ends()
    with self._lock:
      self._over.set()
      if self._asking:
        return
    announce(verdict)
    # The main thread may be in a computation that never ends.
    os._exit(verdict.code)

  def _wait_for_ends(self) -> None:
    """Lets the others end first: without process 0 jax would abort them."""
    deadline = time.monotonic() + 3.0
    for line in self._lines.values():
      line.socket.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        while time.monotonic() < deadline:
          line.receive()
      except EOFError:
        pass


def announce(verdict: Verdict) -> None:
  """Prints why the run ends."""
  sys.stdout.flush()
  print(f"\nerror: {verdict.message}", file=sys.stderr, flush=True)


def _listen(port: int) -> socket.socket:
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True
      )
    return socket.create_server(("", port))
  except OSError as error:
    raise ConfigError(
      f"port {port} of host {socket.gethostname()} cannot be used ({error}): "
      "give another port (--coordinator=HOST:PORT or JAX_COORDINATOR_PORT)"
    ) from error


def _is_ours(filename: str) -> bool:
  return filename.startswith(_PACKAGE) and filename != __file__
