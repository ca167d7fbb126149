"""What a work directory remembers, and what binds a later command."""

import dataclasses
import errno

import jax
import numpy as np
import pytest
from oracles.runs import tiny_run

from oreo_jax import data, decode, files
from oreo_jax.config import ConfigError, DataConfig
from oreo_jax.rollout import graded_trajectories
from oreo_jax.stages import STAGES, Workspace, evaluate, train
from oreo_jax.stages.sft import SFT
from oreo_jax.stages.train import TRAIN
from oreo_jax.train.checkpoint import Checkpoints


def with_train(config, **changes):
  changed = dataclasses.replace(config.train, **changes)
  return dataclasses.replace(config, train=changed)


def file_run(path, **train_settings):
  """A run on a file of trajectories, read byte by byte."""
  config = dataclasses.replace(
    tiny_run(),
    task=type(tiny_run().task)(),
    data=DataConfig(
      path=str(path), tokenizer="byte", row_length=24, held_out=0.0
    ),
  )
  return with_train(config, **train_settings)


def write_rows(path, count=8, response="ok"):
  data.save_trajectories(
    path,
    [
      data.Trajectory.from_text(f"{i}?", response + "!" * (i % 2), i % 2)
      for i in range(count)
    ],
  )
  return path


def small_results():
  method = {
    "name": "SFT, greedy", "policy": "sft", "search": "greedy", "budget": 1,
    "accuracy": 0.5, "interval": [0.1, 0.9], "correct": 1, "total": 2,
    "tokens_per_problem": 3.0, "seconds": 1.0,
  }  # fmt: skip
  return {"task": "maze", "seed": 0, "problems": 2, "methods": [method]}


def config_file(path):
  """The config that a saved file gives back."""
  names = {}
  exec(path.read_text(), names)
  return names["get_config"]()


def listing(directory):
  return sorted(
    (str(p.relative_to(directory)), p.stat().st_mtime_ns)
    for p in directory.rglob("*")
  )


# --- Opening a directory writes nothing; a refused command leaves no record.


def test_opening_a_work_directory_writes_nothing(tmp_path):
  workspace = Workspace(tiny_run(), tmp_path / "run")
  assert workspace.codec.end_ids and workspace.config.model.vocab_size
  assert not (tmp_path / "run").exists()


def test_a_refused_command_leaves_no_config(tmp_path):
  # The old code had saved the config of the refused run by then.
  workspace = Workspace(tiny_run(), tmp_path / "run")
  with pytest.raises(ConfigError, match="oreo collect"):
    train.train_objective(workspace)
  assert not (tmp_path / "run").exists()


def test_a_run_in_a_read_only_folder_can_be_reported(tmp_path, monkeypatch):
  # The old code wrote config.py and the tokenizer before it drew the page.
  directory, elsewhere = tmp_path / "run", tmp_path / "here"
  directory.mkdir()
  elsewhere.mkdir()
  files.write_json(directory / "results.json", small_results())
  before = listing(directory)
  write_text = files.write_text

  def read_only(path, text):
    # The tests may run as root, whom permissions do not stop.
    if directory in path.parents:
      raise PermissionError(errno.EACCES, "read-only", str(path))
    write_text(path, text)

  monkeypatch.setattr(files, "write_text", read_only)
  monkeypatch.chdir(elsewhere)
  lines = []
  STAGES["report"].run(Workspace(tiny_run(), directory), lines.append)
  assert listing(directory) == before
  assert lines[-1] == "report: run-report.html"
  assert "<svg" in (elsewhere / "run-report.html").read_text()


# --- What binds is what was made.


def test_a_start_that_made_nothing_binds_nobody(tmp_path):
  # A run that is refused after it has begun used to forbid the very change
  # that its message advised.
  workspace = Workspace(tiny_run(), tmp_path)
  workspace.begin(SFT)
  changed = tiny_run()
  changed.sft.lr = 0.5
  assert not Workspace(changed, tmp_path).is_done(SFT)


def test_a_checkpoint_binds(tmp_path):
  workspace = Workspace(tiny_run(), tmp_path)
  workspace.begin(SFT)
  with Checkpoints(tmp_path / "sft" / "checkpoints") as checkpoints:
    checkpoints.save(1, {"x": np.zeros(2)})
  changed = tiny_run()
  changed.sft.lr = 0.5
  with pytest.raises(ConfigError, match=r"config.sft.lr.*--overwrite"):
    Workspace(changed, tmp_path).is_done(SFT)


def test_trajectories_that_were_replaced_are_noticed(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl")
  config = file_run(path, objective="rejection", checkpoint_every=1)
  workspace = Workspace(config, tmp_path / "run")
  with jax.set_mesh(workspace.mesh):
    train.train_objective(workspace)
  assert Workspace(config, tmp_path / "run").is_done(TRAIN, "rejection")
  # Cut off, and the file replaced before the run goes on.
  (tmp_path / "run" / "rejection" / "record.json").unlink()
  write_rows(path, response="no")
  with pytest.raises(ConfigError, match="trajectories changed"):
    Workspace(config, tmp_path / "run").is_done(TRAIN, "rejection")
  # The same content under another name is the same data.
  write_rows(path)
  moved = path.rename(tmp_path / "moved.jsonl")
  again = file_run(moved, objective="rejection", checkpoint_every=1)
  assert not Workspace(again, tmp_path / "run").is_done(TRAIN, "rejection")


def test_a_record_is_of_the_records_it_was_made_from(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl")
  config = file_run(path)
  workspace = Workspace(config, tmp_path / "run")
  files.write_json(workspace.record_path("sft"), {"seconds": 1})
  workspace.begin(TRAIN, "oreo").done(steps=1)
  assert workspace.is_done(TRAIN, "oreo")
  files.write_json(workspace.record_path("sft"), {"seconds": 2})
  with pytest.raises(ConfigError, match="start changed"):
    workspace.is_done(TRAIN, "oreo")


def test_an_evaluation_is_of_the_stages_that_are_there(tmp_path):
  # The old code returned results.json although a baseline had come since.
  workspace = Workspace(tiny_run(), tmp_path)
  files.write_json(workspace.record_path("sft"), {"seconds": 1})
  results = small_results()
  files.write_json(tmp_path / "results.json", results)
  workspace.begin(evaluate.EVALUATE).done(methods=0)
  assert evaluate.evaluate(workspace) == results
  files.write_json(workspace.record_path("rejection"), {"seconds": 1})
  assert workspace.config.baselines == ("rejection",)
  assert not evaluate._is_current(workspace)


# --- --overwrite removes what its stage left, and nothing else.


def overwrite(workspace, stage):
  workspace.remove(STAGES[stage].leaves(workspace.given_config))


@pytest.mark.parametrize("objective", ["../../x", "", ".", "collect", "ppo"])
def test_overwrite_never_leaves_the_work_directory(tmp_path, objective):
  # The old code removed ../../x, the whole work directory, the trajectories.
  outside = tmp_path / "x"
  inside = tmp_path / "deep" / "run" / "collect" / "trajectories.jsonl"
  for path in (outside / "precious", inside):
    path.parent.mkdir(parents=True)
    path.write_text("kept")
  with pytest.raises(ConfigError, match="train.objective"):
    workspace = Workspace(
      with_train(tiny_run(), objective=objective), tmp_path / "deep" / "run"
    )
    overwrite(workspace, "train")
  assert (outside / "precious").exists() and inside.exists()


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "", ".", ".."])
def test_only_names_right_inside_can_be_removed(tmp_path, name):
  (tmp_path / "run" / "sft").mkdir(parents=True)
  workspace = Workspace(tiny_run(), tmp_path / "run")
  with pytest.raises(ConfigError, match="--overwrite would remove"):
    workspace.remove(("sft", name))
  # Nothing is removed before everything is checked.
  assert (tmp_path / "run" / "sft").is_dir()


def test_overwrite_removes_what_the_table_says(tmp_path):
  names = ("sft", "collect", "oreo", "rejection", "dpo", "evaluate")
  for name in names:
    (tmp_path / name).mkdir()
  workspace = Workspace(tiny_run(), tmp_path)
  overwrite(workspace, "train")
  assert not (tmp_path / "oreo").exists() and (tmp_path / "sft").exists()
  overwrite(workspace, "run")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["dpo"]


# --- A checkpoint brings its tokenizer.


def test_a_tokenizer_of_other_settings_is_refused(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl")
  Workspace(file_run(path), tmp_path / "run").begin(TRAIN, "oreo")
  config = file_run(path)
  config.data.tokenizer, config.data.tokenizer_vocab = "bpe", 300
  with pytest.raises(ConfigError, match="tokenizer was made with other"):
    Workspace(config, tmp_path / "run").tokenizer  # noqa: B018


# --- Baselines of `run` have their own settings and as many updates.


def test_baselines_take_the_settings_of_their_row(tmp_path):
  config = with_train(tiny_run(), lr=1e-3, beta=0.03, alpha=0.01)
  config.compare.dpo.beta = 0.2
  workspace = Workspace(config, tmp_path)
  dpo = train.with_baseline(workspace, "dpo", 77).config.train
  assert (dpo.objective, dpo.beta, dpo.alpha) == ("dpo", 0.2, 0.0)
  assert dpo.lr == pytest.approx(1e-4) and dpo.updates == 77
  kto = train.with_baseline(workspace, "kto", 77).config.train
  assert kto.lr == pytest.approx(1e-5) and kto.beta == 0.1
  assert workspace.config.train.beta == 0.03
  # The configuration that the folder keeps is the run's, not the baseline's.
  train.with_baseline(workspace, "dpo", 77).begin(TRAIN, "dpo")
  saved = config_file(tmp_path / "config.py")
  assert saved.train == workspace.config.train
  with pytest.raises(ConfigError, match="config.baselines"):
    train.with_baseline(workspace, "ppo", 77)


@pytest.mark.parametrize("objective", ["rejection", "dpo"])
def test_every_method_can_make_as_many_updates(tmp_path, objective):
  # Rejection sampling has a fraction of the sequences: it passes more often.
  path = write_rows(tmp_path / "rows.jsonl", count=96)
  config = file_run(path, batch_size=16, max_steps=0, log_every=1)
  if objective == "dpo":
    rows = [
      data.Trajectory.from_text("?", f"{i}", float(i % 2), problem=str(i // 4))
      for i in range(96)
    ]
    data.save_trajectories(path, rows)
  workspace = Workspace(config, tmp_path / objective)
  updates = train.planned_updates(workspace)
  baseline = train.with_baseline(workspace, objective, updates)
  with jax.set_mesh(workspace.mesh):
    train.train_objective(baseline)
  assert workspace.record(objective)["steps"] == updates
  # DPO's rows hold two answers, though nobody made them longer.
  assert baseline.config.data.row_length == config.data.row_length


# --- Small things that were lost or wrong.


def test_blank_answers_count_and_are_trained_on(tmp_path):
  workspace = Workspace(tiny_run(), tmp_path)
  eos = workspace.codec.end_ids[0]
  answers = [
    decode.Answer(
      place, 0, np.int32(tokens), np.zeros(len(tokens)), True, stopped=False
    )
    for place, tokens in enumerate([[eos], [5, eos]])
  ]
  trajectories = graded_trajectories(
    answers,
    workspace.task.problems("train", 2),
    workspace.task,
    workspace.codec,
  )
  assert trajectories[0].turns[1].content == ""
  assert trajectories[0].reward == 0.0
  blank, full = workspace.codec.tokenize(trajectories)
  # What is trained on is what was sampled, token for token.
  assert blank.tokens[blank.action_mask].tolist() == [eos]
  assert full.tokens[full.action_mask].tolist() == [5, eos]
  assert set(full.extras) == {"behaviour_logps"}


def test_adapters_of_a_later_round_name_no_base(tmp_path):
  from oreo_jax.stages.branch import Branch, Origin

  config = tiny_run()
  first = Workspace(config, tmp_path)
  first.given_config.init = "checkpoint"
  first.__dict__["config"] = dataclasses.replace(config, init="checkpoint")
  first.__dict__["tokenizer"] = None
  assert first.base_name() == "checkpoint"
  second = Branch(tiny_run(), tmp_path / "round1", Origin(first))
  third = Branch(tiny_run(), tmp_path / "round2", Origin(second, "oreo"))
  assert second.base_name() == "checkpoint"
  assert third.base_name() == ""


def test_a_policy_is_read_without_its_critic(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl")
  workspace = Workspace(file_run(path), tmp_path / "run")
  with jax.set_mesh(workspace.mesh):
    train.train_objective(workspace)
    assert workspace.roles("oreo") == ["critic", "policy"]
    files.remove(tmp_path / "run" / "oreo" / "model" / "critic")
    policy, _ = workspace.load_model("oreo", "policy")
  assert "value_head" not in policy


def test_a_response_level_value_network_is_not_ranked_by(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl", count=40)
  config = file_run(path, granularity="response")
  config.data.held_out = 0.5
  workspace = Workspace(config, tmp_path / "run")
  with jax.set_mesh(workspace.mesh):
    train.train_objective(workspace)
    with pytest.raises(ConfigError, match="granularity=token or step"):
      evaluate.evaluate(workspace)
