"""The schema of results: what is missing or wrong is named by file and key."""

import copy
import doctest
import json
import math

import pytest

from oreo_jax.analysis import results
from oreo_jax.analysis.results import (
  Comparison,
  Evaluation,
  Rounds,
  checked,
  read_comparison,
  read_results,
  read_rounds,
)

METHOD = {
  "name": "SFT, greedy",
  "policy": "sft",
  "search": "greedy",
  "budget": 1,
  "accuracy": 1,
  "interval": [0.2, 1.0],
  "correct": 1,
  "total": 1,
  "tokens_per_problem": 4.0,
  "seconds": 0.5,
}
EVALUATION = {
  "task": "maze",
  "seed": 0,
  "problems": 1,
  "methods": [METHOD],
  "example": None,
  "timings": {"sft": 2.0},
}
ROUNDS = {
  "task": "maze",
  "objective": "oreo",
  "split": "test",
  "critic": "fresh",
  "problems": "same",
  "rounds": [
    {
      "round": 0,
      "accuracy": 0.5,
      "interval": [0.1, 0.9],
      "correct": 1,
      "total": 2,
    }
  ],
}


def test_doctests():
  result = doctest.testmod(results)
  assert result.attempted >= 1
  assert result.failed == 0


def test_what_is_written_is_read_again(tmp_path):
  (tmp_path / "results.json").write_text(json.dumps(EVALUATION))
  (tmp_path / "rounds.json").write_text(json.dumps(ROUNDS))
  assert read_results(tmp_path) == EVALUATION
  assert read_rounds(tmp_path) == ROUNDS


@pytest.mark.parametrize(
  ("place", "value", "message"),
  [
    (("task",), 3, "task: expected a text, got 3"),
    (("methods", 0, "budget"), 1.5, r"methods\[0\].budget: expected a whole"),
    (
      ("methods", 0, "accuracy"),
      True,
      r"accuracy: expected a number, got True",
    ),
    (("methods", 0, "interval"), None, "interval: expected a list, got None"),
    (("methods", 0, "interval", 1), "1", r"interval\[1\]: expected a number"),
    (("methods", 0), "SFT", r"methods\[0\]: expected an object, got 'SFT'"),
    (("timings", "sft"), None, "timings.sft: expected a number, got None"),
    (("example",), {"steps": []}, "example has no 'prompt'"),
    (("methods",), "x" * 99, r"methods: expected a list, got 'x+\.\.\."),
  ],
)
def test_the_place_of_a_fault_is_named(tmp_path, place, value, message):
  broken = copy.deepcopy(EVALUATION)
  inner = broken
  for key in place[:-1]:
    inner = inner[key]
  inner[place[-1]] = value
  (tmp_path / "results.json").write_text(json.dumps(broken))
  with pytest.raises(ValueError, match=message) as error:
    read_results(tmp_path)
  assert str(tmp_path / "results.json") in str(error.value)
  assert "run `oreo evaluate` again" in str(error.value)


def test_every_key_but_the_optional_ones_is_required():
  for schema, value in ((Evaluation, EVALUATION), (Rounds, ROUNDS)):
    checked(value, schema)
    for key in value:
      less = {k: v for k, v in value.items() if k != key}
      if key in schema.__optional_keys__:
        checked(less, schema)
        continue
      with pytest.raises(ValueError, match=f"no '{key}'"):
        checked(less, schema)
  assert "methods" in Comparison.__required_keys__
  assert "contrasts" not in Comparison.__required_keys__


def test_figures_that_could_not_be_measured_are_null_or_nan():
  values = {
    "tenths": [1.0],
    "within_problem_auc": [None],
    "within_problem_auc_interval": [[math.nan, None]],
    "pooled_auc": [0.5],
    "mean_correct": [0.5],
    "mean_wrong": [math.nan],
    "histogram": {"edges": [0, 1], "correct": [[1]], "wrong": [[0]]},
    "calibration": {"predicted": [0.1], "observed": [0], "count": [1]},
  }
  checked(EVALUATION | {"values": values}, Evaluation)
  values["calibration"]["count"] = [None]
  with pytest.raises(ValueError, match=r"values.calibration.count\[0\]"):
    checked(EVALUATION | {"values": values}, Evaluation)


def test_a_file_that_is_not_there_says_which_command_writes_it(tmp_path):
  for read, command in (
    (read_results, "oreo evaluate"),
    (read_rounds, "oreo iterate"),
    (read_comparison, "oreo compare"),
  ):
    with pytest.raises(ValueError, match=f"`{command} --workdir={tmp_path}`"):
      read(tmp_path)
