"""The benchmark of search: that all ways find the same answers."""

import pytest
from oracles.benchmarks import report_of


@pytest.mark.slow
def test_all_ways_find_the_same_answers():
  report = report_of("search.py", "--repeats=2")

  # 2 questions of 4 * 4 candidates, of which one becomes the answer.
  lengths = report["steps"]["lengths"]
  assert [case["steps"] for case in lengths] == [1, 3]
  for case in lengths:
    assert case["answer_tokens"] == 2 * 8 * case["steps"]
    assert case["proposed_tokens"] == 16 * case["answer_tokens"]
    assert len(case["seconds"]) == 2

  encoding, slots = report["encoding"], report["slots"]
  for way in (encoding["critic_anew"], encoding["both_anew"], slots):
    assert way["same_answers"] == 1
    assert way["largest_difference_of_values"] < 1e-4

  # Both ways take the steps that the questions need, in fewer or more slots.
  needed = [
    slots[way]["slot_steps"] * slots[way]["useful_slot_steps"]
    for way in ("refilled", "static")
  ]
  assert needed[0] == pytest.approx(needed[1])
  assert slots["refilled"]["slot_steps"] < slots["static"]["slot_steps"]
  # A question that always took all steps would leave nothing to refill.
  assert slots["static"]["useful_slot_steps"] < 0.9
