"""What `oreo evaluate`, `iterate` and `compare` write, and reading it.

The types are the schema of `results.json`, `rounds.json` and
`compare/results.json`: a stage checks what it writes against them, and the
report what it reads. Keys that older runs do not have are `NotRequired`.
"""

# The names of keys that are not required are lost in annotations that are
# strings, so there is no `from __future__ import annotations` here.
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import (
  Any,
  NotRequired,
  TypedDict,
  TypeVar,
  Union,
  get_args,
  get_origin,
  get_type_hints,
  is_typeddict,
)

from oreo_jax import files, metrics

RESULTS_NAME = "results.json"
ROUNDS_NAME = "rounds.json"
COMPARISON_NAME = "compare/results.json"
CONFIG_NAME = "config.py"

# What could not be measured is nan in memory and may be null in a file.
Figure = float | None

Schema = TypeVar("Schema")


class Method(TypedDict):
  """A policy with a way to choose its answers, on the held-out problems."""

  name: str
  policy: str  # the stage that trained it
  # greedy, sample, vote, weighted_vote, best_of_n, best_of_k or beam
  search: str
  budget: int  # sequences a problem
  accuracy: float
  interval: list[float]  # Wilson's, 95%
  correct: int
  total: int
  tokens_per_problem: float
  seconds: float
  rewards: NotRequired[list[int]]  # 0 or 1 a problem
  label: NotRequired[str]  # of the policy, in tables and plots
  colour: NotRequired[str]  # of the policy, a key of report.style.COLOURS


class Histogram(TypedDict):
  """Counts of values at every tenth of the answers."""

  edges: list[float]
  correct: list[list[int]]
  wrong: list[list[int]]


class Calibration(TypedDict):
  """Mean reward against mean value, a figure a bin."""

  predicted: list[float]
  observed: list[float]
  count: list[int]


class Values(TypedDict):
  """Values along graded answers; a figure a tenth of their length."""

  tenths: list[float]
  within_problem_auc: list[Figure]
  within_problem_auc_interval: list[list[Figure]]
  pooled_auc: list[Figure]
  mean_correct: list[Figure]
  mean_wrong: list[Figure]
  histogram: Histogram
  calibration: Calibration
  answers: NotRequired[int]
  mixed_problems: NotRequired[int]


class Score(TypedDict):
  """How well one score ranks the trajectories."""

  name: str
  within_auc: Figure
  within_interval: list[Figure]
  pooled_auc: Figure
  pooled_interval: list[Figure]
  within_lead: NotRequired[Figure]  # of the first score
  within_lead_interval: NotRequired[list[Figure]]
  pooled_lead: NotRequired[Figure]
  pooled_lead_interval: NotRequired[list[Figure]]


class ValueScores(TypedDict):
  """The value against what costs nothing, on recorded trajectories."""

  trajectories: int
  right: int
  problems: int
  mixed_problems: int
  scores: list[Score]  # the value first


class Step(TypedDict):
  """A step of the worked example."""

  text: str
  value: float
  explicit_advantage: float
  implicit_advantage: float


class Example(TypedDict):
  """One answer, step by step."""

  prompt: str
  steps: list[Step]
  reward: float
  start_value: NotRequired[float]


class Evaluation(TypedDict):
  """`results.json`."""

  task: str
  seed: int
  problems: int
  methods: list[Method]
  objective: NotRequired[str]  # the run's own; the last of `methods` otherwise
  values: NotRequired[Values]
  value_scores: NotRequired[ValueScores]
  example: NotRequired[Example | None]
  timings: NotRequired[dict[str, float]]  # seconds by stage


class Round(TypedDict):
  """One round of collecting and training; round 0 is where they start."""

  round: int
  accuracy: float
  interval: list[float]
  correct: int
  total: int
  success: NotRequired[float]  # share of the samples that were right
  trajectories: NotRequired[int]
  steps: NotRequired[int]
  seconds: NotRequired[float]


class Rounds(TypedDict):
  """`rounds.json`."""

  task: str
  objective: str
  split: str
  critic: str
  problems: str
  rounds: list[Round]


class TriedRate(TypedDict):
  """A learning rate of a grid, on the validation problems."""

  lr: float
  accuracy: float
  diverged: bool


class Gain(TypedDict):
  """A method less SFT; see `analysis.comparison`."""

  difference: float
  interval: list[float]
  p_values: list[float]  # McNemar's, one a seed
  only_method: list[int]  # problems that only the method solves, one a seed
  only_sft: list[int]
  p_value: NotRequired[float]  # over seeds and problems, as is the interval
  seeds: NotRequired[int]


class ComparedMethod(TypedDict):
  """A row of the comparison."""

  method: str
  lr: float | None
  accuracies: list[float]  # one a seed
  mean: float
  std: float | None
  against_sft: Gain | None
  seconds: float
  label: NotRequired[str]
  colour: NotRequired[str]  # a key of report.style.COLOURS
  objective: NotRequired[str]
  granularity: NotRequired[str]


class Contrast(TypedDict):
  """A method less another one."""

  method: str
  other: str
  difference: float
  interval: list[float]
  p_value: float
  p_holm: float
  seeds: int


class Comparison(TypedDict):
  """`compare/results.json`."""

  task: str
  split: str
  seeds: list[int]
  problems: int
  validation_problems: int
  searched: dict[str, list[TriedRate]]
  chosen: dict[str, float]
  methods: list[ComparedMethod]  # SFT first
  rounds: dict[str, dict[str, list[Round]]]  # by method and seed
  seconds: float
  contrasts: NotRequired[list[Contrast]]


def read_results(workdir: str | os.PathLike[str]) -> Evaluation:
  """Reads and checks the `results.json` of a run.

  Args:
    workdir: work directory of the run.

  Raises:
    ValueError: If the file is missing, not JSON, or not of the schema.
  """
  results = _read(workdir, RESULTS_NAME, Evaluation, "oreo evaluate")
  if not results["methods"] and not results.get("value_scores"):
    path = Path(workdir) / RESULTS_NAME
    raise ValueError(f"{path}: no methods; run `oreo evaluate` again")
  return results


def read_rounds(workdir: str | os.PathLike[str]) -> Rounds:
  """Reads and checks the `rounds.json` of a run; see `read_results`."""
  return _read(workdir, ROUNDS_NAME, Rounds, "oreo iterate")


def read_comparison(workdir: str | os.PathLike[str]) -> Comparison:
  """Reads and checks `compare/results.json`; see `read_results`."""
  return _read(workdir, COMPARISON_NAME, Comparison, "oreo compare")


def read_stages(
  workdir: str | os.PathLike[str],
) -> dict[str, list[dict[str, float]]]:
  """Reads the metrics of every stage that has some.

  Args:
    workdir: work directory of the run.

  Returns:
    Rows by stage name, stages in the order in which they were first written.
  """
  paths = sorted(
    Path(workdir).glob(f"*/{metrics.FILE_NAME}"),
    key=lambda path: (path.stat().st_mtime, path),
  )
  rows = {path.parent.name: metrics.read_metrics(path) for path in paths}
  return {stage: stage_rows for stage, stage_rows in rows.items() if stage_rows}


def read_config(workdir: str | os.PathLike[str]) -> str | None:
  """Text of the resolved configuration, None if the run did not save it."""
  path = Path(workdir) / CONFIG_NAME
  return path.read_text(encoding="utf-8") if path.exists() else None


def checked(value: Any, schema: type[Schema]) -> Schema:
  """Returns a value as what the schema says it is.

  Args:
    value: of JSON, or about to become it.
    schema: one of the types above.

  Raises:
    ValueError: If a key is missing or holds something else; the message begins
      with where, as in `methods[0].accuracy`.

  >>> checked({"lr": 0.1, "accuracy": "high", "diverged": False}, TriedRate)
  Traceback (most recent call last):
  ...
  ValueError: accuracy: expected a number, got 'high'
  """
  _check(value, schema, "")
  return value


def _read(
  workdir: str | os.PathLike[str],
  name: str,
  schema: type[Schema],
  command: str,
) -> Schema:
  path = Path(workdir) / name
  if not path.exists():
    raise ValueError(
      f"{path}: not found; `{command} --workdir={workdir}` writes it"
    )
  value = files.read_json(path)
  try:
    return checked(value, schema)
  except ValueError as error:
    raise ValueError(f"{path}: {error}; run `{command}` again") from error


def _check(value: Any, schema: Any, place: str) -> None:
  """Raises a ValueError unless the value is of the schema."""
  if is_typeddict(schema):
    _expect(isinstance(value, Mapping), "an object", value, place)
    for key, kind in get_type_hints(schema).items():
      if key in value:
        _check(value[key], kind, f"{place}.{key}" if place else key)
      elif key in schema.__required_keys__:
        raise ValueError(f"{place} has no {key!r}" if place else f"no {key!r}")
    return
  origin, arguments = get_origin(schema), get_args(schema)
  if origin in (Union, types.UnionType):  # of a type and None
    if value is not None:
      _check(value, arguments[0], place)
  elif origin is list:
    _expect(isinstance(value, list), "a list", value, place)
    for index, entry in enumerate(value):
      _check(entry, arguments[0], f"{place}[{index}]")
  elif origin is dict:
    _expect(isinstance(value, Mapping), "an object", value, place)
    for key, entry in value.items():
      _check(entry, arguments[1], f"{place}.{key}" if place else key)
  elif schema is float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _expect(number, "a number", value, place)
  else:
    names = {int: "a whole number", str: "a text", bool: "true or false"}
    _expect(type(value) is schema, names[schema], value, place)


def _expect(holds: bool, what: str, value: Any, place: str) -> None:
  if not holds:
    text = repr(value)
    text = text if len(text) < 60 else text[:57] + "..."
    raise ValueError(f"{place or 'the file'}: expected {what}, got {text}")
