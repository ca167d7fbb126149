import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from oracles.runs import tiny_run

from oreo_jax import report
from oreo_jax.config import (
  CollectConfig,
  ConfigError,
  CriticConfig,
  DataConfig,
  TaskConfig,
)
from oreo_jax.stages import iterate
from oreo_jax.stages.branch import Branch, Origin
from oreo_jax.stages.rounds import round_config
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train.checkpoint import Checkpoints


def run(directory, **changes):
  config = dataclasses.replace(tiny_run(), **changes)
  workspace = Workspace(config, directory)
  with jax.set_mesh(workspace.mesh):
    return iterate.iterate(workspace)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
  """Two rounds of OREO, and what they returned."""
  directory = tmp_path_factory.mktemp("rounds")
  return directory, run(directory, rounds=2)


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_every_round_has_its_folder(rounds):
  directory, results = rounds
  assert [row["round"] for row in results["rounds"]] == [0, 1, 2]
  for number in (1, 2):
    folder = directory / f"round{number}"
    for name in (
      "config.py",
      "collect/trajectories.jsonl",
      "oreo/metrics.jsonl",
    ):
      assert (folder / name).exists(), name
    record = json.loads((folder / "test" / "record.json").read_text())
    assert record["total"] == len(record["rewards"]) == 12
    assert record["accuracy"] == results["rounds"][number]["accuracy"]
  assert json.loads((directory / "rounds.json").read_text()) == results


@pytest.mark.slow
def test_the_last_round_is_searched_with(rounds):
  directory, results = rounds
  found = report.read_results(directory / "round2")
  searches = {method["search"]: method for method in found["methods"]}
  assert {"greedy", "best_of_n", "beam"} <= searches.keys()
  assert searches["greedy"]["accuracy"] == results["rounds"][2]["accuracy"]
  assert not (directory / "round1" / "results.json").exists()


@pytest.mark.slow
def test_a_round_starts_where_the_last_one_ended(rounds):
  directory, _ = rounds
  config = dataclasses.replace(tiny_run(), rounds=2)
  whole = Workspace(config, directory)
  with jax.set_mesh(whole.mesh):
    first = Branch(
      round_config(config, 1),
      directory / "round1",
      Origin(whole),
    )
    second = Branch(
      round_config(config, 2),
      directory / "round2",
      Origin(first, "oreo"),
    )
    sft = leaves(whole.start_policy())
    start = leaves(second.start_policy())
    trained = leaves(first.load_model("oreo", "policy")[0])
    before = leaves(first.start_policy())
  jax.tree.map(np.testing.assert_array_equal, before, sft)
  jax.tree.map(np.testing.assert_array_equal, start, trained)
  assert not all(map(np.array_equal, start, sft))
  texts = [
    [t.turns for t in branch.trajectories()] for branch in (first, second)
  ]
  # The same problems, sampled anew.
  assert {t[0] for t in texts[0]} == {t[0] for t in texts[1]}
  assert texts[0] != texts[1]


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(rounds, tmp_path):
  directory, results = rounds
  copy = tmp_path / "copy"
  shutil.copytree(directory, copy)
  (copy / "rounds.json").unlink()
  (copy / "round2" / "oreo" / "record.json").unlink()
  shutil.rmtree(copy / "round2" / "test")
  kept = copy / "round1" / "oreo" / "record.json"
  before = kept.stat().st_mtime_ns
  again = run(copy, rounds=2)

  def figures(rows):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]

  assert figures(again["rounds"]) == figures(results["rounds"])
  assert kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_critic_can_go_on(rounds, tmp_path):
  directory, _ = rounds
  copy = tmp_path / "copy"
  shutil.copytree(directory, copy)
  for stage in ("oreo", "test", "evaluate"):
    shutil.rmtree(copy / "round2" / stage)
  run(copy, rounds=2, round_critic="continue")
  heads = []
  # The state that round 2 began with, and the model that round 1 ended with.
  for path, step in (
    ("round2/oreo/checkpoints", 0),
    ("round1/oreo/model/critic", None),
  ):
    with Checkpoints(copy / path) as checkpoints:
      args = ocp.args.Composite(tree=ocp.args.StandardRestore())
      tree = checkpoints._manager.restore(step, args=args)["tree"]
    critic = tree["params"]["critic"] if "params" in tree else tree
    heads.append(np.asarray(critic["value_head"]))
  assert np.abs(heads[0]).max() > 0
  np.testing.assert_array_equal(*heads)


@pytest.mark.slow
def test_other_settings_are_noticed(rounds, tmp_path):
  directory, _ = rounds
  with pytest.raises(ConfigError, match="round_critic"):
    run(directory, rounds=2, round_critic="continue")


def test_seeds_and_problems_of_a_round():
  config = dataclasses.replace(tiny_run(), round_problems="fresh")
  first, third = (round_config(config, n) for n in (1, 3))
  assert first == config
  assert third.collect.skip == 2 * config.collect.problems
  assert third.collect.seed != first.collect.seed
  assert third.train.seed != first.train.seed
  same = round_config(tiny_run(), 3)
  assert same.collect.skip == config.collect.skip


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"task": TaskConfig(), "data": DataConfig(tokenizer="byte")},
      "config.task.name",
    ),
    (
      {"train": dataclasses.replace(tiny_run().train, objective="value")},
      "oreo",
    ),
    (
      {"collect": CollectConfig(problems=0), "round_problems": "fresh"},
      "collect.problems",
    ),
    (
      {"critic": CriticConfig(kind="shared"), "round_critic": "continue"},
      "critic.kind=separate",
    ),
    (
      {"collect": CollectConfig(problems=10_000), "round_problems": "fresh"},
      "train problems",
    ),
  ],
)
def test_what_rounds_cannot_have(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    run(tmp_path, **changes)


def test_the_table():
  start = {
    "round": 0,
    "accuracy": 0.5,
    "interval": [0.4, 0.6],
    "correct": 50,
    "total": 100,
  }
  after = start | {
    "round": 1,
    "accuracy": 0.625,
    "success": 0.25,
    "trajectories": 1200,
    "seconds": 61.4,
  }
  header, _, first, second = report.format_rounds([start, after]).splitlines()
  assert header.split()[:2] == ["round", "solved"]
  assert first.split() == "0 50.0% 40.0 to 60.0 50/100".split()
  assert second.split() == (
    "1 62.5% 40.0 to 60.0 50/100 25.0% 1,200 61".split()
  )
