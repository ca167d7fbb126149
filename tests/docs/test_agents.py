"""The environment of docs/agents.md is played, learned, and played again."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from oreo_jax.stages.records import RECORD

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "agents.md").read_text()
(BLOCK,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CONFIG = """
from oreo_jax import config


def get_config():
  return config.Config(
    task=config.TaskConfig(name="guess"),
    agent=config.AgentConfig(max_action_tokens=3, max_tokens=48),
    data=config.DataConfig(chat=True, row_length=32),
    model=config.ModelConfig(
      embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16,
      mlp_dim=64,
    ),
    sft=config.SftConfig(examples=200, batch_size=8, epochs=2.0, lr=3e-3),
    collect=config.CollectConfig(problems=60, samples=2, batch_size=16),
    train=config.TrainConfig(
      batch_size=8, granularity="turn", lr=1e-3, critic_lr=3e-3
    ),
    evaluate=config.EvaluateConfig(
      problems=40, budgets=(1, 3), batch_size=16
    ),
  )
"""


@pytest.mark.slow
def test_the_example_runs_from_teacher_to_report(tmp_path):
  path = tmp_path / "guess.py"
  path.write_text(BLOCK + CONFIG)
  command = [f"--config={path}", f"--workdir={tmp_path / 'run'}"]
  done = subprocess.run(
    [sys.executable, "-m", "oreo_jax", "run", *command],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  ways = {
    (row["policy"], row["search"], row["budget"]) for row in results["methods"]
  }
  assert ways == {
    *(
      (policy, way, 1)
      for policy in ("sft", "rejection", "oreo")
      for way in ("greedy", "sample")
    ),
    ("oreo", "best_of_k", 3),
  }
  assert all(row["total"] == 40 for row in results["methods"])
  # The teacher is right in five of ten guesses at most; so are its pupils.
  assert 0 < sum(row["correct"] for row in results["methods"])
  record = json.loads((tmp_path / "run" / "collect" / RECORD).read_text())
  assert sum(record["ended"].values()) == 120
  assert "OREO + best of 3 actions" in done.stdout
