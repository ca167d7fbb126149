"""The benchmark against PyTorch: that both sides compute the same."""

import pytest
from oracles.benchmarks import report_of


@pytest.mark.slow
def test_both_sides_compute_the_same_loss():
  pytest.importorskip("torch")
  report = report_of("train_step.py", "--repeats=3", "--threads=1")
  (result,) = report["results"]
  check = result["check"]
  assert check["same_loss"] and check["same_parameters"]
  # At the reference a wrong log-ratio would go unseen.
  assert check["first_loss"]["ours"] > 0.1
  for side in ("ours", "torch"):
    assert len(result[side]["seconds"]) == 3
    assert result[side]["process_peak_bytes"] > 2**20
  assert result["ours"]["compiler_bytes"]["peak"] > 0
