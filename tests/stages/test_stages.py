"""The work directory and the stages in it."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from oracles.runs import TINY_MODEL, tiny_run

from oreo_jax.config import (
  CollectConfig,
  Config,
  ConfigError,
  DataConfig,
  MeshConfig,
  SftConfig,
  TaskConfig,
  TrainConfig,
)
from oreo_jax.data import TrajectoryError
from oreo_jax.decode import Sampler
from oreo_jax.decode.layout import Layout
from oreo_jax.stages import collect, fitting, sft, train
from oreo_jax.stages.records import check_identity
from oreo_jax.stages.sft import SFT
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train import PreemptedError

GOOD = {"prompt": "1+1=", "response": "2\n", "reward": 1.0}


def table(path, *lines):
  """Writes a file of good rows with bad lines from line 3 on."""
  good = json.dumps(GOOD).encode()
  path.write_bytes(b"\n".join([good, good, *lines, good]) + b"\n")
  return path


def with_field(**fields):
  return json.dumps({**GOOD, **fields}).encode()


def without(key):
  return json.dumps({k: v for k, v in GOOD.items() if k != key}).encode()


BAD = {
  "broken JSON": b'{"prompt": "a", ',
  "missing key": without("reward"),
  "reward is text": with_field(reward="high"),
  "reward is NaN": b'{"prompt": "a", "response": "b", "reward": NaN}',
  "not UTF-8": b'{"prompt": "\xff", "response": "b", "reward": 1}',
}


def file_config(path, **data):
  return Config(
    model=TINY_MODEL,
    data=DataConfig(path=str(path), tokenizer="byte", **data),
    train=TrainConfig(batch_size=8),
  )


@pytest.mark.parametrize("line", BAD.values(), ids=BAD.keys())
def test_bad_rows_are_one_error_with_file_and_line(tmp_path, line):
  path = table(tmp_path / "rows.jsonl", line)
  workspace = Workspace(file_config(path), tmp_path / "run")
  with pytest.raises(TrajectoryError) as caught:
    workspace.trajectories()
  assert "rows.jsonl:3" in str(caught.value)
  assert "--config.data.on_error=skip" in str(caught.value)


def test_bad_rows_are_skipped_and_counted(tmp_path, caplog):
  path = table(tmp_path / "rows.jsonl", *BAD.values())
  workspace = Workspace(file_config(path, on_error="skip"), tmp_path / "run")
  with caplog.at_level(logging.WARNING, logger="absl"):
    assert len(workspace.trajectories()) == 3
  assert str(len(BAD)) in caplog.text


def test_a_prompt_longer_than_the_row_names_its_line(tmp_path):
  path = table(tmp_path / "rows.jsonl", with_field(prompt="x" * 50))
  config = file_config(path, row_length=16, held_out=0.0)
  with pytest.raises(ValueError, match="rows.jsonl:3.*row_length"):
    train.train_objective(Workspace(config, tmp_path / "run"))


def test_no_trajectories_says_what_to_do(tmp_path):
  workspace = Workspace(file_config(tmp_path / "none"), tmp_path / "run")
  with pytest.raises(ConfigError, match="oreo collect.*--config.data.path"):
    workspace.trajectories()


@pytest.mark.parametrize("objective", ["rejection", "dpo"])
def test_nothing_to_learn_from_says_why(tmp_path, objective):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b"\n".join([with_field(reward=0.0)] * 3) + b"\n")
  config = file_config(path, row_length=64, held_out=0.0)
  config.train.objective = objective
  workspace = Workspace(config, tmp_path / "run")
  with pytest.raises(ConfigError, match="3 trajectories, 0 of them right"):
    train.train_objective(workspace)


@pytest.mark.parametrize("stage", [sft.fine_tune, collect.collect])
def test_stages_that_need_a_task_say_so(tmp_path, stage):
  workspace = Workspace(file_config(tmp_path / "none"), tmp_path / "run")
  with pytest.raises(ConfigError, match="--config.task.name"):
    stage(workspace)


def test_answers_are_drawn_as_the_settings_say(tmp_path, monkeypatch):
  class CalledError(Exception):
    pass

  def collect_answers(*_, sampler, **__):
    raise CalledError(sampler)

  monkeypatch.setattr(collect, "collect_answers", collect_answers)
  monkeypatch.setattr(Workspace, "start_policy", lambda self: {})
  monkeypatch.setattr(Layout, "place", lambda self, params: params)
  config = tiny_run(
    collect=CollectConfig(
      problems=2,
      temperature=0.5,
      top_k=3,
      top_p=0.9,
      min_p=0.1,
      repetition_penalty=1.2,
    )
  )
  with pytest.raises(CalledError) as caught:
    collect.collect(Workspace(config, tmp_path))
  assert caught.value.args == (Sampler(0.5, 3, 0.9, 0.1, 1.2),)


def test_a_record_without_a_setting_of_today_names_it(tmp_path):
  now = {"settings": {"collect": {"seed": 0, "min_p": 0.0}}, "made_from": {}}
  before = {**now, "settings": {"collect": {"seed": 0}}}
  with pytest.raises(ConfigError, match=r"\(config.collect.min_p\): use anoth"):
    check_identity(before, now, tmp_path)


def test_a_mesh_that_does_not_divide_is_an_error(tmp_path):
  config = dataclasses.replace(
    file_config(tmp_path / "none"), mesh=MeshConfig(fsdp=3)
  )
  with pytest.raises(ConfigError, match="--config.mesh"):
    _ = Workspace(config, tmp_path).mesh


def test_a_vocabulary_too_small_for_the_tokenizer_is_an_error(tmp_path):
  config = file_config(tmp_path / "none")
  config.model = dataclasses.replace(TINY_MODEL, vocab_size=17)
  with pytest.raises(ConfigError, match="--config.model.vocab_size=0"):
    Workspace(config, tmp_path).config  # noqa: B018


SETTINGS = {
  "examples": 32,
  "batch_size": 8,
  "lr": 1e-2,
  "log_every": 1,
  "measure_every": 0,
  "checkpoint_every": 1,
}


def maze_config(**changes):
  return Config(
    model=TINY_MODEL,
    mesh=MeshConfig(),
    task=TaskConfig("maze", {"variant": "easy"}),
    data=DataConfig(row_length=64),
    sft=SftConfig(**{**SETTINGS, **changes}),
  )


def fit_sft(directory, **changes):
  workspace = Workspace(maze_config(**changes), directory)
  with jax.set_mesh(workspace.mesh):
    sft.fine_tune(workspace)
    return workspace, workspace.load_model("sft", "policy")[0]


def test_a_stage_is_restartable_done_once_and_guards_its_settings(
  tmp_path, monkeypatch
):
  directory = tmp_path / "run"
  save = Workspace.save_models

  def cut_off(*unused_args):
    raise PreemptedError("now")

  # Cut off after training, before the outcome is saved: begun, not done.
  monkeypatch.setattr(Workspace, "save_models", cut_off)
  with pytest.raises(PreemptedError):
    fit_sft(directory)
  monkeypatch.setattr(Workspace, "save_models", save)
  assert not Workspace(maze_config(), directory).is_done(SFT)
  with pytest.raises(ConfigError, match=r"\(config.sft.lr\).*--overwrite"):
    Workspace(maze_config(lr=1.0), directory).is_done(SFT)
  # The same command goes on from the checkpoint and trains no step again.
  workspace, policy = fit_sft(directory)
  rows = (directory / "sft" / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(row)["step"] for row in rows]
  assert steps == list(range(1, workspace.record("sft")["steps"] + 1))
  # Done: not done again.
  monkeypatch.setattr(fitting, "fit", cut_off)
  _, again = fit_sft(directory)
  for a, b in zip(jax.tree.leaves(policy), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


def test_record_of_a_stage_that_was_not_run_names_it(tmp_path):
  with pytest.raises(ConfigError, match="run the stage `sft`"):
    Workspace(maze_config(), tmp_path).record("sft")
