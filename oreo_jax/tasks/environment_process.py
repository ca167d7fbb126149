"""One process of `environment_pool`, seen from the parent.

Nothing here waits for a process that does not answer, whatever state it is in:
reads and writes take what there is, and who waits for more has a deadline.
"""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

_PROGRAM = pathlib.Path(__file__).with_name("environment_worker.py")
_CLOSE_S = 5.0  # to close environments, before the process is killed
# The worker's own timer is for the case that this process is gone.
_GRACE_S = 2.0


class EnvironmentProcess:
  """A running `environment_worker`.

  Attributes:
    input: its standard input, which takes commands.
    output: its standard output, which gives replies.
    outbox: what it has not read yet.
    deadline: until when it must have answered, as `time.monotonic`.
    is_ready: it has said that it can make environments.
  """

  def __init__(self, make_environment: Callable[[], Any], start_s: float):
    """Starts the process; it is given `start_s` seconds to be ready."""
    # Its temporary files, such as libraries that an engine unpacks, are removed
    # with it, even if it is killed.
    self._folder = tempfile.mkdtemp(prefix="environment-")
    # -P keeps the folder of the program off its path.
    arguments = [str(start_s + _GRACE_S), self._folder]
    self._process = subprocess.Popen(
      [sys.executable, "-P", str(_PROGRAM), *arguments],
      # The order of sets must not depend on chance.
      env=os.environ | {"PYTHONHASHSEED": "0", "TMPDIR": self._folder},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      # A group of its own: Ctrl-C does not reach it, and processes that an
      # engine starts are killed with it.
      start_new_session=True,
    )
    # Never None, as both were asked to be pipes.
    self.input = cast(IO[bytes], self._process.stdin)
    self.output = cast(IO[bytes], self._process.stdout)
    os.set_blocking(self.input.fileno(), False)
    os.set_blocking(self.output.fileno(), False)
    self.is_ready = False
    self._wait_for(start_s)
    self._limit_s = 0.0  # of the command that it has not begun
    self._unread = b""
    self.outbox = pickle.dumps(sys.path) + pickle.dumps(make_environment)
    self.write()

  def send(self, command: Mapping[str, Any], *, limit_s: float) -> None:
    """Sends a command, to be answered within `limit_s` once it is ready."""
    self._limit_s = limit_s
    if self.is_ready:
      self._wait_for(limit_s)
    limits = {"limit_s": limit_s + _GRACE_S}
    self.outbox += pickle.dumps({**command, **limits})
    self.write()

  def write(self) -> None:
    """Writes as much of the outbox as the process takes now."""
    try:
      while self.outbox:
        self.outbox = self.outbox[os.write(self.input.fileno(), self.outbox) :]
    except BlockingIOError:
      pass
    except BrokenPipeError:
      self.outbox = b""  # It is dead, which its output tells.

  def receive(self) -> dict[str, Any] | None:
    """Returns a reply, if there is one.

    Returns:
      What the worker said about the command; or `failed`, a text, if it is
      dead, too late, or cannot make environments; None if it needs more time.
    """
    try:
      data = os.read(self.output.fileno(), 1 << 20)
    except BlockingIOError:
      if self.deadline <= time.monotonic():
        waited = f"no answer within {self._waits_s:.3g} s"
        return {"kind": "timeout", "failed": waited}
      return None
    if not data:
      return {"kind": "crash", "failed": "the process died"}
    *lines, self._unread = (self._unread + data).split(b"\n")
    for reply in map(json.loads, lines):
      if "ready" not in reply:
        return dict(reply)
      self.is_ready = True
      self._wait_for(self._limit_s)
    return None

  def _wait_for(self, seconds: float) -> None:
    self._waits_s = seconds
    self.deadline = time.monotonic() + seconds

  def has_died_idle(self) -> bool:
    """Says whether a process that has nothing to do is dead."""
    with selectors.DefaultSelector() as selector:
      selector.register(self.output, selectors.EVENT_READ)
      # It has nothing to say, so what there is to read is the end.
      return bool(selector.select(0))

  def describe_end(self) -> str:
    """Returns how a process that was killed or died ended, for messages."""
    code = self._process.returncode
    if code < 0:
      return f" (signal {signal.Signals(-code).name})"
    return f" (exit code {code})"

  def hang_up(self) -> None:
    """Closes its input, so that it closes its environments and ends."""
    self.outbox = b""
    try:
      self.input.close()
    except BrokenPipeError:
      pass

  def end(self) -> None:
    """Waits until it has ended by itself, and kills it if it does not."""
    try:
      self._process.wait(_CLOSE_S)
    except subprocess.TimeoutExpired:
      pass
    self.kill()

  def kill(self) -> None:
    """Kills the process and all that it started; returns when it is gone."""
    # Not yet waited for, a dead process keeps its number: nothing else has it.
    if self._process.returncode is None:
      try:
        os.killpg(self._process.pid, signal.SIGKILL)
      except ProcessLookupError:
        pass
      self._process.wait()
    self.hang_up()
    self.output.close()
    shutil.rmtree(self._folder, ignore_errors=True)
