"""Processes that are compared: each has its memory and threads for itself."""

import json
import os
import subprocess
import sys


class Side:
  """A process that holds one side's models and does work when asked."""

  def __init__(self, name: str, script: str, *arguments: str):
    """Starts `script --serve name arguments...` and waits for its facts."""
    self._process = subprocess.Popen(
      [sys.executable, script, "--serve", name, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self._name = name
    self.facts = self._answer()

  def ask(self, request: str) -> dict:
    """Sends a request, a line, and waits for the answer."""
    self._process.stdin.write(request + "\n")
    self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      raise SystemExit(f"the side {self._name!r} ended with code {code}")
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.wait()


def answers(threads: int):
  """Prepares this process to be a side; returns what sends an answer."""
  # Libraries size their pools of threads by the cores they may use.
  if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:threads])
  # What libraries print must not come between the answers.
  channel, sys.stdout = sys.stdout, sys.stderr

  def answer(**facts) -> None:
    channel.write(json.dumps(facts) + "\n")
    channel.flush()

  return answer
