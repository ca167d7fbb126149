"""Which process is to blame when a run has to end: no sockets, no clocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

# The exit code of a process whose run ended because another one died or hangs.
# (EX_PROTOCOL of sysexits.h, a fault of the other side.)
EXIT_LOST = 76


class Timeouts(NamedTuple):
  """How long the processes of a run wait for each other, in seconds.

  Attributes:
    start: until all of them have come, at the start.
    silence: until one that is not heard of counts as dead. A connection that
      closes shows a death at once; this is for a host that has lost its power
      or its network.
    hang: until a run counts as hanging, when no process has moved. Compiling
      stands still as well, so this must be longer than any compilation.
    grace: for the others to end by themselves after one has failed.
  """

  start: float = 300.0
  silence: float = 60.0
  hang: float = 900.0
  grace: float = 10.0


class Verdict(NamedTuple):
  """Why the run ends, and with which exit code."""

  code: int
  message: str
  process: int  # the one it is about; -1: all of them


@dataclasses.dataclass
class Peer:
  """What is known of one process."""

  process: int
  host: str
  heard: float  # when it was last heard of, on the listener's clock
  still: float = 0.0  # seconds since its main thread was last seen moving
  count: int = 0  # events that its main thread has come to
  place: str = "the start"  # the last event, and the line it is at
  ended: bool = False  # all its work is done
  lost: bool = False  # its connection has closed
  failure: tuple[int, str] | None = None  # exit code and message
  failed_at: float = 0.0

  @property
  def name(self) -> str:
    """Returns what messages call it."""
    return f"process {self.process} (host {self.host})"


def judge(
  peers: Sequence[Peer], now: float, timeouts: Timeouts
) -> Verdict | None:
  """Returns why the run has to end; None while all is well.

  A death comes before an error: the error may be what the others saw of it.

  Args:
    peers: all processes of the run.
    now: the time, on the clock of `Peer.heard`.
    timeouts: when waiting ends.
  """
  for peer in peers:
    if peer.ended or peer.failure:
      continue
    if peer.lost:
      return _dead(peer, "its connection has closed")
    if now - peer.heard > timeouts.silence:
      return _dead(peer, f"it was not heard of for {timeouts.silence:.0f} s")
  failed = [peer for peer in peers if peer.failure]
  if failed:
    first = min(failed, key=lambda peer: peer.failed_at)
    at = first.failed_at
    others = [peer for peer in peers if not (peer.failure or peer.ended)]
    # Everyone alive has been heard of since: it is not a death that `first`
    # noticed before the watch did.
    all_alive = all(peer.heard > at for peer in others)
    if all_alive and (not others or now - at > timeouts.grace):
      code, message = first.failure or (1, "")
      return Verdict(code, f"{first.name} failed: {message}", first.process)
    return None
  working = [peer for peer in peers if not peer.ended]
  if working and min(peer.still for peer in working) > timeouts.hang:
    return _hanging(working, timeouts)
  return None


def _dead(peer: Peer, reason: str) -> Verdict:
  message = (
    f"{peer.name} died: {reason}. See what it printed last; the same command "
    "goes on from the last checkpoint"
  )
  return Verdict(EXIT_LOST, message, peer.process)


def _hanging(working: Sequence[Peer], timeouts: Timeouts) -> Verdict:
  """Blames those who are behind; without such ones, says where all are."""
  last = min(peer.count for peer in working)
  behind = [peer for peer in working if peer.count == last]
  ahead = [peer for peer in working if peer.count > last]
  message = (
    f"the run hangs, no process has moved for {timeouts.hang:.0f} s "
    "(--hang_timeout): "
    + "; ".join(f"{peer.name} is at {peer.place}" for peer in behind)
  )
  if ahead:
    message += f". {len(ahead)} others wait for it, at {ahead[0].place}"
  return Verdict(EXIT_LOST, message, behind[0].process if ahead else -1)
