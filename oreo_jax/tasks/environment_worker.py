"""One worker of `environment_pool`: plays episodes until its input ends.

Run as a program, it imports nothing of the package but what the environment
asks for, and so neither jax nor a device. It reads pickled commands from
standard input and writes one JSON object a line. It ends when its input does,
which the kernel sees to however the parent died; a timer that no Python code
handles ends it even inside a native call that never returns.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any


class Games:
  """The environments of one process, each in a numbered slot."""

  def __init__(self, make_environment: Callable[[], Any]) -> None:
    self._make_environment = make_environment
    self._environments: dict[int, Any] = {}

  def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
    """Carries out one command.

    Args:
      command: `slot`; `problem` to begin with, or None to go on; `actions` to
        take one after the other; `list_actions`, whether to list those that
        are possible then.

    Returns:
      `steps`, a list of (observation, reward, done), that of `reset` first, up
      to the one that ended the episode; and `actions`, the list or None. Or
      `error`, a text: the environment raised, and is thrown away.
    """
    slot, problem = command["slot"], command["problem"]
    try:
      if slot not in self._environments:
        self._environments[slot] = self._make_environment()
      environment = self._environments[slot]
      steps: list[tuple[str, float, bool]] = []
      if problem is not None:
        steps.append((str(environment.reset(problem)), 0.0, False))
      for action in command["actions"]:
        observation, reward, done = environment.step(action)
        steps.append((str(observation), float(reward), bool(done)))
        if done:
          break
      listed = environment.actions() if command["list_actions"] else None
    # Some engines call sys.exit where they should raise.
    except (Exception, SystemExit) as error:
      self._throw_away(slot)
      return {"error": _describe(error)}
    return {"steps": steps, "actions": None if listed is None else [*listed]}

  def close(self) -> None:
    """Closes all environments."""
    for slot in list(self._environments):
      self._throw_away(slot)

  def _throw_away(self, slot: int) -> None:
    environment = self._environments.pop(slot, None)
    try:
      if environment is not None:
        environment.close()
    except (Exception, SystemExit):
      pass  # It may be why it is thrown away.


def main() -> None:
  """Reads how to make environments, then commands, from standard input."""
  start_s, folder = float(sys.argv[1]), sys.argv[2]
  # Replies go to a descriptor of our own: engines print.
  replies = os.fdopen(os.dup(1), "w", encoding="ascii")
  os.dup2(2, 1)

  def reply(fields: Mapping[str, Any]) -> None:
    replies.write(json.dumps(fields) + "\n")
    replies.flush()

  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.setitimer(signal.ITIMER_REAL, start_s)
  games = None
  try:
    sys.path[:] = pickle.load(sys.stdin.buffer)
    games = Games(pickle.load(sys.stdin.buffer))
    reply({"ready": True})
    while True:
      signal.setitimer(signal.ITIMER_REAL, 0)
      command = pickle.load(sys.stdin.buffer)
      signal.setitimer(signal.ITIMER_REAL, command["limit_s"])
      reply(games.answer(command))
  except (EOFError, BrokenPipeError):  # The parent closed the pool, or is gone.
    signal.setitimer(signal.ITIMER_REAL, start_s)
    if games is not None:
      games.close()
    shutil.rmtree(folder, ignore_errors=True)
    # The pool made it the leader of a group, which holds what engines started.
    if os.getpgrp() == os.getpid():
      os.killpg(0, signal.SIGKILL)
  except Exception as error:
    reply({"failed": _describe(error)})


def _describe(error: BaseException) -> str:
  """Returns what happened and where, in a line."""
  text = "".join(traceback.format_exception_only(error)).strip()
  frames = traceback.extract_tb(error.__traceback__)
  if not frames:
    return text
  last = frames[-1]
  return f"{text} ({os.path.basename(last.filename)}:{last.lineno})"


if __name__ == "__main__":
  main()
