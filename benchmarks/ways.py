"""Ways of doing the same thing, which take turns in one process."""

import sys
import time


def take_turns(what: str, ways: dict, repeats: int) -> tuple[dict, dict]:
  """Calls every way in turns.

  Args:
    what: is measured.
    ways: functions by their names.
    repeats: timed turns; one more before them compiles.

  Returns:
    ({name: list of seconds}, {name: what the last call returned}).
  """
  seconds, results = {name: [] for name in ways}, {}
  for turn in range(repeats + 1):
    for name, call in ways.items():
      start = time.perf_counter()
      results[name] = call()
      if turn:
        seconds[name].append(time.perf_counter() - start)
    print(f"{what}: turn {turn} of {repeats}", file=sys.stderr, flush=True)
  return seconds, results
