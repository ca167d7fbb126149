"""One worker of `pool`: compares answers until its input ends.

Run as a program, one JSON object a line in and out. It imports neither jax nor
the package. Nothing it is given can make it outlive its limits: the memory is
capped, and two timers that no Python code handles end the process from the
kernel, even inside one huge integer power and even if the parent is gone. The
first (SIGPROF) counts processor time alone, so that a busy machine does not
change which answers are too slow; the second (SIGALRM) counts wall time.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys


def main() -> None:
  """Reads limits from the command line, then jobs from standard input."""
  cpu_s, wall_s, memory_mb = map(float, sys.argv[1:])
  # Replies go to a descriptor of our own: libraries may print.
  replies = os.fdopen(os.dup(1), "w", encoding="ascii")
  os.dup2(2, 1)

  def reply(**fields: bool | str) -> None:
    replies.write(json.dumps(fields) + "\n")
    replies.flush()

  def set_timers(cpu_s: float, wall_s: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)

  try:
    from math_verify import parse, verify
  except ImportError as error:
    reply(missing=str(error))
    return
  # The first use imports much more; no answer should have to pay for it.
  verify(
    parse("$x+1$", parsing_timeout=None),
    parse("$1+x$", parsing_timeout=None),
    timeout_seconds=None,
  )
  limit = int(memory_mb * 2**20)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  reply(ready=True)
  for line in sys.stdin:
    job = json.loads(line)
    set_timers(cpu_s, wall_s)
    try:
      # No limits of math-verify's own: they are raised by a signal handler,
      # which waits for the running C call, and they would reset our alarm.
      reference, answer = (
        parse(f"${job[side]}$", parsing_timeout=None)
        for side in ("reference", "answer")
      )
      equal = verify(
        reference,
        answer,
        allow_set_relation_comp=True,
        timeout_seconds=None,
      )
      set_timers(0, 0)
      reply(equal=bool(equal))
    except Exception as error:  # no answer may end a rollout
      set_timers(0, 0)
      reply(error=type(error).__name__)
      if isinstance(error, MemoryError):
        return


if __name__ == "__main__":
  main()
