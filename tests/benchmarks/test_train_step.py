"""The benchmark against PyTorch: that both sides compute the same."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_both_sides_compute_the_same_loss():
  pytest.importorskip("torch")
  ended = subprocess.run(
    [
      sys.executable,
      ROOT / "benchmarks" / "train_step.py",
      "--size=tiny",
      "--repeats=3",
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
  (result,) = json.loads(ended.stdout)["results"]
  check = result["check"]
  assert check["same_loss"] and check["same_parameters"]
  # At the reference a wrong log-ratio would go unseen.
  assert check["first_loss"]["ours"] > 0.1
  for side in ("ours", "torch"):
    assert len(result[side]["seconds"]) == 3
    assert result[side]["process_peak_bytes"] > 2**20
  assert result["ours"]["compiler_bytes"]["peak"] > 0
