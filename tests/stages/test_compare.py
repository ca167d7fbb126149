import dataclasses
import html.parser
import json

import jax
import numpy as np
import pytest
from oracles.runs import tiny_run

from oreo_jax import report
from oreo_jax.config import (
  METHODS,
  CompareConfig,
  Config,
  ConfigError,
  EvaluateConfig,
  MethodConfig,
  TaskConfig,
)
from oreo_jax.stages import compare
from oreo_jax.stages.workspace import Workspace


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


SMALL = CompareConfig(
  seeds=2,
  methods=("rejection", "dpo"),
  share=1.0,
  validation_problems=10,
  rounds=2,
  round_methods=("rejection",),
  rejection=MethodConfig("rejection", lr_scales=(1.0, 3.0)),
  dpo=MethodConfig("dpo", beta=0.1, alpha=0.0, lr_scales=(0.1,)),
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
  with pytest.raises(ConfigError, match="compare.methods"):
    dataclasses.replace(SMALL, methods=("ppo",)).validate("compare")
  with pytest.raises(ConfigError, match="compare.dpo.lr_scales"):
    Config(
      compare=CompareConfig(dpo=MethodConfig("dpo", lr_scales=()))
    ).validate()
  with pytest.raises(ConfigError, match="compare.share"):
    CompareConfig(share=0.0).validate("compare")
  with pytest.raises(ConfigError, match="round_seeds"):
    CompareConfig(seeds=1, round_seeds=2).validate()
  # A fair search: OREO gets no more tries than the others.
  table = CompareConfig()
  tried = {name: len(getattr(table, name).lr_scales) for name in METHODS}
  ours = [count for name, count in tried.items() if name.startswith("oreo")]
  assert max(ours) <= min(tried.values())


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
  tried = [cell(1e-4, 0.0), cell(1e-3, 0.0, True)]
  assert choose(config, "dpo", tried) == 1e-4
  with pytest.raises(ConfigError, match="compare.dpo.lr_scales"):
    choose(config, "dpo", [cell(1e-3, 0.0, True)])


def measured(*rewards):
  return [
    {"accuracy": float(np.mean(r)), "rewards": list(r), "seconds": 4.0}
    for r in rewards
  ]


def test_a_row_of_the_table_by_hand():
  # Two seeds, four problems.
  sft = measured([1, 0, 0, 0], [1, 1, 0, 0])
  ours = measured([1, 1, 1, 0], [1, 1, 1, 1])
  row = compare.summarise("dpo", ours, sft, 1e-3)
  assert row["mean"] == pytest.approx(0.875)
  assert row["std"] == pytest.approx(np.std([0.75, 1.0], ddof=1))
  against = row["against_sft"]
  assert against["difference"] == pytest.approx(0.5)
  # Two problems turned right in each seed and none wrong: 2 * (1/2)^2.
  assert against["p_values"] == [0.5, 0.5]
  assert against["only_method"] == [2, 2] and against["only_sft"] == [0, 0]
  # Per problem the seeds gain 0, 1/2, 1 and 1/2.
  low, high = against["interval"]
  assert 0.0 <= low < 0.5 < high <= 1.0
  json.dumps(row, allow_nan=False)


def test_seeds_of_one_problem_are_not_counted_twice():
  rng = np.random.default_rng(0)
  sft, ours = (list(rng.integers(0, 2, 200)) for _ in range(2))
  once = compare.summarise("dpo", measured(ours), measured(sft), None)
  thrice = compare.summarise(
    "dpo", measured(ours, ours, ours), measured(sft, sft, sft), None
  )
  assert thrice["against_sft"]["interval"] == pytest.approx(
    once["against_sft"]["interval"]
  )


def test_a_method_that_changes_nothing():
  sft = measured([1, 0, 1], [0, 0, 1])
  against = compare.summarise("kto", sft, sft, 1e-3)["against_sft"]
  assert against["difference"] == 0 and against["p_values"] == [1.0, 1.0]
  assert against["interval"] == [0.0, 0.0]


RESULTS = {
  "task": "maze",
  "seconds": 3300.0,
  "split": "test",
  "seeds": [0, 1],
  "problems": 1000,
  "validation_problems": 500,
  "chosen": {"dpo": 1e-4, "oreo_token": 1e-3, "oreo_step": 1e-3},
  "searched": {"dpo": [cell(1e-4, 0.55), cell(1e-3, 0.0, True)]},
  "methods": [
    {
      "method": name,
      "lr": None if name == "sft" else 1e-3,
      "accuracies": [mean - 0.01, mean + 0.01],
      "mean": mean,
      "std": 0.014,
      "against_sft": None
      if name == "sft"
      else {
        "difference": mean - 0.5,
        "interval": [mean - 0.53, mean - 0.47],
        "p_values": [1e-9, 0.0213],
        "only_method": [1, 1],
        "only_sft": [0, 0],
      },
      "seconds": 61.2,
    }
    for name, mean in (
      ("sft", 0.5),
      ("dpo", 0.55),
      ("oreo_token", 0.7),
      ("oreo_step", 0.69),
    )
  ],
  "rounds": {
    name: {
      str(seed): [
        {
          "round": number,
          "accuracy": accuracy,
          "interval": [accuracy - 0.03, accuracy + 0.03],
          "correct": round(1000 * accuracy),
          "total": 1000,
        }
        for number, accuracy in enumerate(accuracies)
      ]
      for seed in (0, 1)
    }
    for name, accuracies in (
      ("oreo_token", (0.5, 0.7, 0.8)),
      ("rejection", (0.5, 0.6, 0.61)),
    )
  },
}


def test_a_rate_at_the_edge_of_its_grid_is_named():
  rates = [cell(1e-4, 0.5), cell(1e-3, 0.6), cell(1e-2, 0.4)]
  for chosen, remarks in ((1e-3, 0), (1e-4, 1), (1e-2, 1)):
    results = RESULTS | {"searched": {"dpo": rates}, "chosen": {"dpo": chosen}}
    text = report.format_comparison(results)
    assert text.count("best at the edge of the grid") == remarks


def test_the_table_as_text():
  lines = report.format_comparison(RESULTS).splitlines()
  row = next(line for line in lines if line.startswith("DPO"))
  assert row.split() == (
    "DPO 0.001 55.0% 1.4 54.0 56.0 +5.0 +2.0 to +8.0 0.0213 61".split()
  )
  assert any("0.0001: 55.0%*  0.001: diverged" in line for line in lines)
  assert any(line.endswith("55 minutes in all") for line in lines)
  assert any("500 validation problems, seed 0" in line for line in lines)
  assert "rounds of Rejection sampling, seed 1" in lines


class Tags(html.parser.HTMLParser):
  """Counts elements and checks that they close in order."""

  VOID = {"meta", "br", "hr", "img", "link"}

  def __init__(self):
    super().__init__()
    self.open, self.count = [], {}

  def handle_starttag(self, tag, attrs):
    self.count[tag] = self.count.get(tag, 0) + 1
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.count[tag] = self.count.get(tag, 0) + 1

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_page(tmp_path):
  path = report.write_comparison(tmp_path, RESULTS)
  page = path.read_text(encoding="utf-8")
  tags = Tags()
  tags.feed(page)
  assert not tags.open
  assert tags.count["svg"] == 3
  assert "http" not in page.replace("http-equiv", "")
  # Without rounds and with one granularity, the methods alone.
  methods = [m for m in RESULTS["methods"] if m["method"] != "oreo_step"]
  less = RESULTS | {"rounds": {}, "searched": {}, "methods": methods}
  page = report.write_comparison(tmp_path, less).read_text(encoding="utf-8")
  assert page.count("<svg") == 1 and "What was searched" not in page
