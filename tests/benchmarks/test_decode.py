"""The benchmark of decoding: that both sides and both ways say the same."""

import pytest
from oracles.benchmarks import report_of


@pytest.mark.slow
def test_all_ways_give_the_same_answers():
  report = report_of("decode.py", "--repeats=2", "--threads=1")

  for batch in report["greedy"]["batches"]:
    assert len(batch["sides"]["oreo_jax"]["seconds"]) == 2
    # There is a second side where torch is installed.
    assert batch.get("first_tokens_equal", True)
    assert batch.get("tokens_equal", 1.0) > 0.95

  collection = report["collection"]["tiny"]
  assert collection["same_answers"] == 1
  share = {
    way: collection[way]["useful_slot_steps"] for way in ("refilled", "static")
  }
  assert share["static"] < share["refilled"] <= 1
