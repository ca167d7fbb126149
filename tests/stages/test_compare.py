import dataclasses

import jax
import pytest
from oracles.runs import tiny_run

from oreo_jax.config import (
  CompareConfig,
  Config,
  ConfigError,
  EvaluateConfig,
  MethodConfig,
  TaskConfig,
)
from oreo_jax.stages import compare
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train import METHODS

SMALL = CompareConfig(
  seeds=2,
  methods=("rejection", "dpo"),
  share=1.0,
  validation_problems=10,
  rounds=2,
  round_methods=("rejection",),
  rejection=MethodConfig(lr_scales=(1.0, 3.0)),
  dpo=MethodConfig(lr_scales=(0.1,)),
)


def run(directory, settings=SMALL):
  config = dataclasses.replace(tiny_run(), compare=settings)
  workspace = Workspace(config, directory)
  with jax.set_mesh(workspace.mesh):
    return compare.compare(workspace)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  directory = tmp_path_factory.mktemp("compare")
  return directory, run(directory)


@pytest.mark.slow
def test_the_whole_plan_on_a_tiny_model(done):
  directory, results = done
  assert results["seeds"] == [0, 1]
  methods = {m["method"]: m for m in results["methods"]}
  assert list(methods) == ["sft", "rejection", "dpo"]
  assert all(len(m["accuracies"]) == 2 for m in methods.values())
  # Only the grid of two was searched, and the better one of it taken.
  assert list(results["searched"]) == ["rejection"]
  tried = results["searched"]["rejection"]
  assert [cell["lr"] for cell in tried] == [1e-3, 3e-3]
  best = max(cell["accuracy"] for cell in tried)
  assert best == next(
    c["accuracy"] for c in tried if c["lr"] == results["chosen"]["rejection"]
  )
  assert results["chosen"]["dpo"] == 1e-4
  # The other seed trained with the rate chosen, and with no other.
  for seed, cells in ((0, 2), (1, 1)):
    folder = directory / "compare" / f"seed{seed}" / "rejection"
    assert len(list(folder.iterdir())) == cells
  rows = results["rounds"]["rejection"]["0"]
  assert [row["round"] for row in rows] == [0, 1, 2]
  assert rows[0]["accuracy"] == methods["sft"]["accuracies"][0]
  assert rows[1]["accuracy"] == methods["rejection"]["accuracies"][0]


@pytest.mark.slow
def test_all_methods_of_a_seed_read_one_file(done):
  directory, _ = done
  root = directory / "compare"
  found = {
    str(p.parent.relative_to(root)) for p in root.rglob("trajectories.jsonl")
  }
  assert found == {
    "seed0/collect",
    "seed1/collect",
    "seed0/rounds/rejection/round2/collect",
  }


@pytest.mark.slow
def test_a_second_call_does_nothing_again(done, capsys):
  directory, results = done
  records = sorted(directory.rglob("record.json"))
  before = [path.stat().st_mtime_ns for path in records]
  capsys.readouterr()
  assert run(directory) == results
  assert sorted(directory.rglob("record.json")) == records
  assert [path.stat().st_mtime_ns for path in records] == before
  total = compare.planned_cost(dataclasses.replace(tiny_run(), compare=SMALL))
  assert f"compare: 100% ({total}/{total})" in capsys.readouterr().err


@pytest.mark.slow
def test_another_seed_adds_to_what_is_there(done):
  directory, results = done
  fewer = dataclasses.replace(SMALL, seeds=1)
  alone = run(directory, fewer)
  assert alone["methods"][1]["std"] is None
  assert (
    alone["methods"][1]["accuracies"]
    == (results["methods"][1]["accuracies"][:1])
  )


def test_what_a_comparison_cannot_have(tmp_path):
  config = tiny_run()
  for changes, message in (
    ({"task": TaskConfig()}, "config.task.name"),
    ({"evaluate": EvaluateConfig(split="validation")}, "evaluate.split=test"),
    ({"compare": dataclasses.replace(SMALL, validation_problems=999)}, "999"),
  ):
    changed = dataclasses.replace(config, **changes)
    if not changed.task.name:
      data = dataclasses.replace(config.data, tokenizer="byte")
      changed = dataclasses.replace(changed, data=data)
    with pytest.raises(ValueError, match=message):
      compare.compare(Workspace(changed, tmp_path / message))
    assert not (tmp_path / message / "compare").exists()


def test_settings_of_a_comparison():
  Config(compare=SMALL).validate()
  for field in ("methods", "round_methods"):
    settings = dataclasses.replace(SMALL, **{field: ("ppo",)})
    with pytest.raises(ConfigError, match=f"compare.{field}.*oreo_token"):
      compare.method_names(Config(compare=settings))
  assert compare.method_names(Config()) == tuple(METHODS)
  with pytest.raises(ConfigError, match="compare.share"):
    CompareConfig(share=0.0).validate("compare")
  with pytest.raises(ConfigError, match="round_seeds"):
    CompareConfig(seeds=1, round_seeds=2).validate()
  # A fair search: OREO gets no more tries than the others.
  tried = {name: len(row.lr_scales) for name, row in METHODS.items()}
  ours = {name: tried.pop(name) for name in list(tried) if "oreo" in name}
  assert max(ours.values()) <= min(tried.values())


def test_a_seed_moves_all_draws_but_the_split():
  base = dataclasses.replace(
    tiny_run(), compare=dataclasses.replace(SMALL, share=0.3)
  )
  moved = compare.config_of_seed(base, 2)
  assert moved.seed == base.seed + 2
  for section in ("sft", "collect", "train"):
    assert getattr(moved, section).seed == getattr(base, section).seed + 2
  assert moved.data.seed == base.data.seed
  assert moved.collect.problems == 8  # 0.3 * 24, rounded up
  everything = dataclasses.replace(
    base, collect=dataclasses.replace(base.collect, problems=0)
  )
  assert compare.config_of_seed(everything, 0).collect.problems == 0


def cell(lr, accuracy, diverged=False):
  return {"lr": lr, "accuracy": accuracy, "diverged": diverged}


def test_the_choice_of_a_rate():
  config = Config()
  choose = compare.best_rate
  tried = [cell(1e-4, 0.5), cell(1e-3, 0.7), cell(1e-2, 0.7)]
  assert choose(config, "dpo", tried) == 1e-3
  tried = [cell(rate, 0.7) for rate in (1e-5, 1e-4, 1e-3)] + [cell(1e-2, 0.1)]
  assert choose(config, "dpo", tried) == 1e-4
  tried = [cell(1e-4, 0.0), cell(1e-3, 0.0, True)]
  assert choose(config, "dpo", tried) == 1e-4
  with pytest.raises(ConfigError, match="compare.dpo.lr_scales"):
    choose(config, "dpo", [cell(1e-3, 0.0, True)])
