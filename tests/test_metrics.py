import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from oreo_jax import metrics


def rows_of(directory):
  return metrics.read_metrics(directory / "metrics.jsonl")


def test_rows_are_on_disk_when_write_returns(tmp_path):
  with metrics.MetricsWriter(tmp_path / "sft", tensorboard=False) as writer:
    writer.write(1, {"loss": jnp.float32(0.5), "lr": np.float64(1e-3)})
    assert rows_of(tmp_path / "sft") == [{"step": 1, "loss": 0.5, "lr": 1e-3}]
    writer.write(2, {"loss": jnp.bfloat16(0.25), "tokens": 7})
  assert rows_of(tmp_path / "sft")[1] == {"step": 2, "loss": 0.25, "tokens": 7}


def test_every_line_is_strict_json(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"loss": math.nan, "norm": math.inf})

  def fail(constant):
    raise AssertionError(constant)

  text = (tmp_path / "metrics.jsonl").read_text()
  row = json.loads(text, parse_constant=fail)
  assert row == {"step": 1, "loss": None, "norm": None}
  assert math.isnan(rows_of(tmp_path)[0]["loss"])


def test_a_resumed_run_drops_the_later_rows(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in range(1, 6):
      writer.write(step, {"loss": float(step)})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "lo')  # killed in mid-write
  with metrics.MetricsWriter(
    tmp_path, resume_step=3, tensorboard=False
  ) as writer:
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    writer.write(4, {"loss": 40.0})
  assert [row["loss"] for row in rows_of(tmp_path)] == [1.0, 2.0, 3.0, 40.0]
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
  for loss in (1.0, 2.0):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
      writer.write(1, {"loss": loss})
  assert rows_of(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_another_process_writes_nothing(tmp_path):
  with metrics.MetricsWriter(tmp_path / "x", enabled=False) as writer:
    writer.write(1, {"loss": 1.0})
  assert not (tmp_path / "x").exists()


def test_tensorboard_events(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write(1, {"loss/value": 0.5})
  (events,) = tmp_path.glob("events.out.tfevents.*")
  assert b"loss/value" in events.read_bytes()


def test_bad_metrics_are_errors(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(ValueError, match=r"'norms'.*shape \(2,\)"):
      writer.write(1, {"norms": jnp.ones(2)})
    with pytest.raises(ValueError, match="'name'"):
      writer.write(1, {"name": "x"})
    with pytest.raises(ValueError, match="rename"):
      writer.write(1, {"step": 1.0})
  assert rows_of(tmp_path) == []


@pytest.mark.parametrize(
  "line", ["{", "[1]", '{"loss": 1}', '{"step": 1, "loss": "x"}', ""]
)
def test_a_broken_row_is_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected"):
    metrics.read_metrics(path)


def test_wandb_is_asked_for_and_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match="pip install wandb"):
    metrics.MetricsWriter(tmp_path, wandb={"project": "x"})


def test_wandb_gets_every_row(tmp_path, monkeypatch):
  calls = []
  run = types.SimpleNamespace(
    log=lambda row, step: calls.append((step, row)),
    finish=lambda: calls.append("finish"),
  )
  module = types.SimpleNamespace(init=lambda **kw: calls.append(kw) or run)
  monkeypatch.setitem(sys.modules, "wandb", module)
  with metrics.MetricsWriter(
    tmp_path, tensorboard=False, wandb={"project": "maze"}
  ) as writer:
    writer.write(3, {"loss": 1.0})
  assert calls == [
    {"dir": str(tmp_path), "project": "maze"},
    (3, {"loss": 1.0}),
    "finish",
  ]
