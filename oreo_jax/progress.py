"""A progress bar for terminals, and plain lines for logs."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

import tqdm


class Progress:
  """A progress bar with rate and time left; a context manager.

  On a terminal it is a bar that redraws. Elsewhere (a log file, CI) it is a
  plain line at most every tenth of the work, and no more often than every
  `interval_s`, so that logs stay short.
  """

  def __init__(
    self,
    total: int,
    description: str,
    *,
    unit: str = "step",
    initial: int = 0,
    interval_s: float = 5.0,
    enabled: bool = True,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      total: units of work in all.
      description: what is being done, a word or two.
      unit: name of one unit of work, singular.
      initial: units done before (a resumed run); they do not count in the rate.
      interval_s: least seconds between two plain lines.
      enabled: whether to show anything; give `hosts.is_chief()`.
      stream: where to; standard error by default.
      clock: seconds that only rise.
    """
    self.total = total
    self.done = initial
    self._initial = initial
    self._description = description
    self._unit = unit
    self._interval_s = interval_s
    self._stream = stream or sys.stderr
    self._clock = clock
    self._started = self._last_line = clock()
    self._tenth = initial * 10 // max(total, 1)
    self._shown: dict[str, float] = {}
    self._bar = None
    self._plain = enabled and not self._stream.isatty()
    if enabled and not self._plain:
      self._bar = tqdm.tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=f" {unit}",
        file=self._stream,
        dynamic_ncols=True,
        smoothing=0.1,
      )

  def update(self, count: int = 1, **shown: float) -> None:
    """Counts work as done.

    Args:
      count: Units done since the last call.
      **shown: Figures to show beside the bar, such as `loss=0.12`.
    """
    self.done += count
    self._shown = shown or self._shown
    if self._bar is not None:
      if shown:
        self._bar.set_postfix(shown, refresh=False)
      self._bar.update(count)
    elif self._plain:
      now = self._clock()
      tenth = self.done * 10 // max(self.total, 1)
      if (
        tenth > self._tenth
        and self.done < self.total
        and now - self._last_line >= self._interval_s
      ):
        self._tenth, self._last_line = tenth, now
        rate = self._rate(now)
        left = (self.total - self.done) / rate if rate else math.inf
        self._line(f"{_rate_text(rate)} {self._unit}/s, {left:.0f} s left")

  def close(self) -> None:
    """Ends the bar, or writes the last plain line; a second call is nothing."""
    if self._bar is not None:
      self._bar.close()
    elif self._plain:
      now = self._clock()
      self._line(
        f"{_rate_text(self._rate(now))} {self._unit}/s, took "
        f"{now - self._started:.1f} s"
      )
    self._bar = None
    self._plain = False

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *unused_error: object) -> None:
    self.close()

  def _rate(self, now: float) -> float:
    elapsed = now - self._started
    return (self.done - self._initial) / elapsed if elapsed > 0 else 0.0

  def _line(self, timing: str) -> None:
    percent = 100 * self.done // max(self.total, 1)
    shown = "".join(f", {name} {x:.4g}" for name, x in self._shown.items())
    self._stream.write(
      f"{self._description}: {percent}% ({self.done}/{self.total}), "
      f"{timing}{shown}\n"
    )
    self._stream.flush()


def _rate_text(rate: float) -> str:
  return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
