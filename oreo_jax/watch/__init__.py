"""A watch over the processes of a run: one that fails ends them all.

jax ends a run when a process sends no heartbeat any more, but its message does
not name the host, a process that waits in Python for ever still sends them, and
a start that does not come about kills the process without an error. So each
process keeps one connection to process 0, over which it says every other second
how long it has stood still and where. Process 0 judges, and what it finds it
tells all others, who print it and end with the same exit code.
"""

from oreo_jax.watch.judge import EXIT_LOST, Peer, Timeouts, Verdict, judge
from oreo_jax.watch.watch import Watch, announce

__all__ = [
  "EXIT_LOST",
  "Peer",
  "Timeouts",
  "Verdict",
  "Watch",
  "announce",
  "judge",
]
