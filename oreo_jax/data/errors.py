"""Bad rows: what is wrong, where, and what mends it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from absl import logging

Row = TypeVar("Row")
Parsed = TypeVar("Parsed")


class TrajectoryError(ValueError):
  """A row that cannot be used, with its place and what mends it.

  Attributes:
    place: its file and line.
    problem: what is wrong with it.
  """

  kind = "bad row"
  fix = "correct the row"
  skip = "--config.data.on_error=skip"

  def __init__(self, place: str, problem: str):
    self.place, self.problem = place, problem
    super().__init__(
      f"{place}: {problem}; {self.fix}, or pass {self.skip} to drop and count"
      " such rows"
    )


class BrokenJsonError(TrajectoryError):
  """The line is not a JSON object."""

  kind = "broken JSON"
  fix = "write one JSON object a line"


class MissingKeyError(TrajectoryError):
  """A required key is missing or holds something of the wrong type."""

  kind = "missing key"
  fix = (
    'give "prompt", "response" and "reward", or "conversations" and "reward"'
  )


class UnsupportedKeyError(TrajectoryError):
  """A key asks for what cannot be done with the row."""

  kind = "unsupported key"
  fix = "remove the key, or give the row in a form that can honour it"


class BadRewardError(TrajectoryError):
  """The reward is not a finite number."""

  kind = "bad reward"
  fix = "write the reward as a finite number such as 1.0"


class EmptyResponseError(TrajectoryError):
  """There is no action to learn from.

  An empty answer is no such error: its action is to end at once.
  """

  kind = "no action"
  fix = "give an assistant turn to learn from, or remove the row"


class SampledTokensError(TrajectoryError):
  """The recorded tokens are not those of the text."""

  kind = "sampled tokens"
  fix = (
    "use the tokenizer that sampled them"
    ' (--config.data.tokenizer), or remove the keys "tokens" and "logps" to'
    " train on the text alone"
  )


class EncodingError(TrajectoryError):
  """The text is not valid UTF-8."""

  kind = "not UTF-8"
  fix = "save the file as UTF-8"


class TemplateError(TrajectoryError):
  """The chat template cannot render the turns, or not as they are."""

  kind = "chat template"
  fix = (
    "use a template that writes every turn as it is, or one trajectory a turn"
  )


class PromptLengthError(TrajectoryError):
  """The prompt leaves no room for an action, or has no token at all."""

  kind = "prompt length"
  fix = "raise --config.data.max_length and row_length or mend the prompt"


class SequenceLengthError(TrajectoryError):
  """Prompt and response together are too long."""

  kind = "sequence length"
  fix = "raise --config.data.max_length and row_length"
  skip = "--config.data.on_long=skip"


def check_choice(value: str, argument: str) -> None:
  """Raises unless the value is "raise" or "skip"."""
  if value not in ("raise", "skip"):
    raise ValueError(
      f"{argument} is {value!r}; expected 'raise' or 'skip'"
      f" (--config.data.{argument})"
    )


def keep_good(
  rows: Iterable[Row],
  parse: Callable[[Row], Sequence[Parsed]],
  *,
  on_error: str = "raise",
  skipped: collections.Counter[str] | None = None,
) -> list[Parsed]:
  """Parses rows; raises at the first bad one, or drops and counts them.

  Args:
    rows: what to parse.
    parse: returns the objects a row holds, or raises `TrajectoryError`.
    on_error: "raise" or "skip".
    skipped: takes the number of dropped rows by kind; by default they are
      logged here.

  Returns:
    All objects, in order.
  """
  check_choice(on_error, "on_error")
  counts = collections.Counter[str]() if skipped is None else skipped
  objects: list[Parsed] = []
  for row in rows:
    try:
      objects.extend(parse(row))
    except TrajectoryError as error:
      if on_error == "raise":
        raise
      count_skipped(error, counts)
  if skipped is None:
    log_skipped(counts, len(objects))
  return objects


def count_skipped(
  error: TrajectoryError, skipped: collections.Counter[str]
) -> None:
  """Counts a dropped row, and logs the first one of its kind."""
  if not skipped[error.kind]:
    logging.warning("skipped: %s", error)
  skipped[error.kind] += 1


def log_skipped(skipped: collections.Counter[str], remaining: int) -> None:
  """Logs how many rows were dropped, by kind."""
  if skipped:
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items()))
    logging.warning(
      "skipped %d rows, kept %d: %s", skipped.total(), remaining, counts
    )
