"""One worker of `pool`: compares answers until its input ends.

Run as a program, one JSON object a line in and out. It imports neither jax nor
the package. Nothing it is given can make it outlive its limits: the memory is
capped, and an alarm that no Python code handles ends the process from the
kernel, even inside one huge integer power and even if the parent is gone.
"""

import json
import os
import resource
import signal
import sys


def main() -> None:
  """Reads limits from the command line, then jobs from standard input."""
  timeout_s, memory_mb = float(sys.argv[1]), int(sys.argv[2])
  # Replies go to a descriptor of our own: libraries may print.
  replies = os.fdopen(os.dup(1), "w", encoding="ascii")
  os.dup2(2, 1)

  def reply(**fields) -> None:
    replies.write(json.dumps(fields) + "\n")
    replies.flush()

  try:
    from math_verify import parse, verify
  except ImportError as error:
    reply(missing=str(error))
    return
  limit = memory_mb * 2**20
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  reply(ready=True)
  for line in sys.stdin:
    job = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
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
      signal.setitimer(signal.ITIMER_REAL, 0)
      reply(equal=bool(equal))
    except Exception as error:  # whatever it is, it is not worth a rollout
      signal.setitimer(signal.ITIMER_REAL, 0)
      reply(error=type(error).__name__)
      if isinstance(error, MemoryError):
        return


if __name__ == "__main__":
  main()
