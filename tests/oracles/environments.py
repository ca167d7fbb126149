"""Environments that behave and misbehave as they are told."""

import os
import signal
import subprocess
import sys
import time

from oreo_jax.tasks.environment import Environment, Step


class Parrot(Environment):
  """Repeats actions, counts them, and obeys some; see `step`."""

  def __init__(self, size=0):
    self.ballast = " " * size
    self.count = 0

  def reset(self, problem):
    self.problem, self.count = problem, 0
    if problem.prompt == "no start":
      raise ValueError("this problem has no start")
    return f"say something, {problem.id}"

  def step(self, action):
    self.count += 1
    verb, _, rest = action.partition(" ")
    if verb == "exit":
      os._exit(int(rest))
    if verb == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    if verb == "abort":
      os.abort()
    if verb == "quit":
      sys.exit("the engine gives up")
    if verb == "sleep":
      time.sleep(float(rest))
    if verb == "raise":
      raise RuntimeError(rest)
    if verb == "child":
      child = subprocess.Popen(["sleep", "600"])
      return Step(str(child.pid))
    if verb == "pid":
      return Step(str(os.getpid()))
    if verb == "folder":
      open(os.path.join(os.environ["TMPDIR"], "unpacked"), "w").close()
      return Step(os.environ["TMPDIR"])
    if verb == "print":
      print(rest, flush=True)
    if verb == "modules":
      return Step(
        " ".join(name for name in rest.split() if name in sys.modules)
      )
    if verb == "clock":
      return Step(str(time.time_ns()))
    if verb == "large":
      return Step("x" * int(rest))
    if verb == "end":
      return Step("bye", float(rest), True)
    return Step(f"{self.problem.id} {self.count}: {action[:40]}")

  def actions(self):
    return ["go on", f"end {self.count}"]


def unable():
  raise OSError("there is no engine here")
