"""The benchmark of decoding: that both sides and both ways say the same."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_all_ways_give_the_same_answers():
  ended = subprocess.run(
    [
      sys.executable,
      ROOT / "benchmarks" / "decode.py",
      "--size=tiny",
      "--repeats=2",
      "--threads=1",
    ],
    capture_output=True,
    text=True,
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
  )
  assert ended.returncode == 0, ended.stderr[-3000:]
  report = json.loads(ended.stdout)

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
