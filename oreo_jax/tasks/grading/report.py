"""Says how often a grader failed to compare an answer."""

from __future__ import annotations

from collections.abc import Mapping

from absl import logging

# Outcomes that tell more of the grader than of the answer, which gets 0.
FAILURES = ("timeout", "stalled", "crash", "error")
_SHARE_TO_WARN_OF = 0.01


def warn_of_failures(
  counts: Mapping[str, int], graded: int, *, advice: str
) -> None:
  """Logs a warning if more than 1% of the answers could not be compared.

  Args:
    counts: outcomes of one call of a grader.
    graded: how many answers the call graded.
    advice: what may mend it.
  """
  failures = {name: counts[name] for name in FAILURES if counts.get(name)}
  total = sum(failures.values())
  if total > _SHARE_TO_WARN_OF * graded:
    logging.warning(
      "%d of %d answers were graded 0 because the grader failed on them (%s);"
      " %s",
      total,
      graded,
      ", ".join(f"{count} {name}" for name, count in failures.items()),
      advice,
    )
