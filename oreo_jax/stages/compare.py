"""All methods on the same trajectories, several seeds (`oreo compare`).

For every seed one SFT policy and one set of trajectories; every method starts
there. With the first seed each method tries its learning rates and keeps the
one best on validation problems; all seeds are then measured on the test split.

compare/seed<s>/{sft,collect}/          where all methods of a seed start
compare/seed<s>/start/                  the SFT policy, measured
compare/seed<s>/<method>/lr_<lr>/       a cell: settings, training, accuracies
compare/seed<s>/rounds/<method>/round<k>/   rounds after the first
compare/{results.json,report.html}

Each of these is done once; a run that was cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from absl import logging

from oreo_jax import files, report
from oreo_jax.analysis.comparison import contrasts, summarise
from oreo_jax.analysis.results import Comparison as ComparisonResults
from oreo_jax.analysis.results import checked
from oreo_jax.config import Config, ConfigError
from oreo_jax.progress import Progress
from oreo_jax.stages.branch import Branch, Origin, measure
from oreo_jax.stages.collect import collect
from oreo_jax.stages.rounds import (
  check_rounds,
  play_round,
  round_config,
  round_row,
)
from oreo_jax.stages.sft import fine_tune
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.train import TRAIN, planned_updates, train_objective
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train import METHODS, OBJECTIVES, DivergedError, get_method

# Weights of the progress bar: about ten seconds each for the maze. A training
# that is not listed counts as `_TRAINING`.
_COST = {"sft": 10, "collect": 1, "rejection": 6}
_TRAINING = 9


def run(workspace: Workspace, say: Say) -> None:
  """Runs the comparison, and says its tables."""
  results = compare(workspace)
  say(report.format_comparison(results))
  if workspace.is_chief:
    path = report.write_comparison(workspace.directory / "compare", results)
    say(f"report: {path}")


class Comparison:
  """The seeds, cells and rounds of one comparison, and how far it is."""

  def __init__(self, workspace: Workspace, progress: Progress):
    """Prepares; nothing runs yet."""
    self.workspace = workspace
    self.config = workspace.config
    self.settings = workspace.config.compare
    self.directory = workspace.directory / "compare"
    self._progress = progress
    self._counted: set[pathlib.Path] = set()
    self._planned: dict[pathlib.Path, int] = {}

  def home(self, seed: int) -> Workspace:
    """Opens the SFT policy and the trajectories of a seed, made if need be."""
    config = config_of_seed(self.config, seed)
    home = Workspace(config, self.directory / f"seed{seed}")
    fine_tune(home)
    self._count(home.path("sft"), _COST["sft"])
    collect(home)
    self._count(home.path("collect"), _COST["collect"])
    return home

  def _updates(self, home: Workspace) -> int:
    """Returns how many updates every method of a seed makes."""
    if home.directory not in self._planned:
      self._planned[home.directory] = planned_updates(home)
    return self._planned[home.directory]

  def start(self, home: Workspace) -> Branch:
    """Opens the branch in which the SFT policy itself is measured."""
    return Branch(home.config, home.directory / "start", Origin(home))

  def cell(self, home: Workspace, name: str, lr: float) -> Branch:
    """Opens one method with one learning rate on the data of a seed."""
    method = get_method(name).given(self.config)
    updates = self._updates(home)
    config = method.configure(home.config, lr=lr, updates=updates)
    directory = home.directory / name / f"lr_{lr:.3g}"
    return Branch(config, directory, Origin(home), trajectories_of=home)

  def train(self, cell: Branch) -> bool:
    """Trains a cell; False if it diverged."""
    objective = cell.config.train.objective
    logging.info("compare: %s", cell.directory)
    if cell.is_done(TRAIN, "diverged"):
      return False
    try:
      train_objective(cell)
    except DivergedError as error:
      logging.warning("%s: %s", cell.directory, error)
      cell.begin(TRAIN, "diverged").done(message=str(error))
      return False
    finally:
      self._count(cell.directory, _COST.get(objective, _TRAINING))
    return True

  def search(self, home: Workspace, name: str) -> list[dict[str, Any]]:
    """Tries the learning rates of a method on the validation split."""
    rates = learning_rates(self.config, name)
    tried = []
    # A grid of one leaves nothing to choose.
    for lr in rates if len(rates) > 1 else ():
      cell = self.cell(home, name, lr)
      trained = self.train(cell)
      objective = cell.config.train.objective
      figures = measure(cell, objective, "validation") if trained else {}
      tried.append(
        {
          "lr": lr,
          "accuracy": figures.get("accuracy", 0.0),
          "diverged": not trained,
        }
      )
    return tried

  def measured(self, cell: Branch) -> dict[str, Any]:
    """Trains a cell if need be and measures it on the test split."""
    if not self.train(cell):
      raise ConfigError(
        f"{cell.directory} diverged with the learning rate that was best for "
        "the first seed: leave that rate out of --config.compare."
        f"{cell.directory.parent.name}.lr_scales"
      )
    objective = cell.config.train.objective
    figures = measure(cell, objective, self.config.evaluate.split)
    return figures | {"seconds": cell.record(objective)["seconds"]}

  def rounds(
    self, home: Workspace, name: str, first: Branch
  ) -> list[dict[str, Any]]:
    """Iterates a method; its cell is the first round."""
    split = self.config.evaluate.split
    objective = first.config.train.objective
    figures = measure(self.start(home), "", split), first.record(split)
    rows = [round_row(number, row) for number, row in enumerate(figures)]
    last = first
    for number in range(2, self.settings.rounds + 1):
      last = Branch(
        round_config(first.config, number),
        home.directory / "rounds" / name / f"round{number}",
        Origin(last, objective),
      )
      rows.append(play_round(last, number))
      self._count(
        last.directory, _COST["collect"] + _COST.get(objective, _TRAINING)
      )
    return rows

  def _count(self, directory: pathlib.Path, cost: int) -> None:
    """Moves the progress bar on, once a directory."""
    if directory not in self._counted:
      self._counted.add(directory)
      self._progress.update(cost)


def compare(workspace: Workspace) -> ComparisonResults:
  """Runs the comparison; returns what it wrote to `compare/results.json`.

  Raises:
    ConfigError: without a task, or with settings that cannot work.
  """
  config = workspace.config
  settings = config.compare
  task = workspace.need_task(
    "a comparison needs problems to train and to measure on"
  )
  if config.evaluate.split == "validation":
    raise ConfigError(
      "config.evaluate.split=validation chooses the learning rates of a "
      "comparison: set --config.evaluate.split=test"
    )
  methods = method_names(config)
  if settings.rounds > 1 and settings.round_seeds:
    check_rounds(workspace, settings.rounds)
  # A split that is too small is better noticed now than after the training.
  task.problems("validation", settings.validation_problems)
  task.problems(config.evaluate.split, config.evaluate.problems or None)
  enabled = workspace.is_chief
  total = planned_cost(config)
  with Progress(total, "compare", unit="unit", enabled=enabled) as progress:
    plan = Comparison(workspace, progress)
    searched: dict[str, Any] = {}
    chosen: dict[str, float] = {}
    measured: dict[str, list[dict[str, Any]]] = {"sft": []}
    rounds: dict[str, Any] = {}
    for seed in range(settings.seeds):
      home = plan.home(seed)
      sft = measure(plan.start(home), "", config.evaluate.split)
      measured["sft"].append(sft | {"seconds": home.record("sft")["seconds"]})
      for name in methods:
        if seed == 0:
          searched[name] = plan.search(home, name)
          chosen[name] = best_rate(config, name, searched[name])
        cell = plan.cell(home, name, chosen[name])
        measured.setdefault(name, []).append(plan.measured(cell))
        if name in settings.round_methods and seed < settings.round_seeds:
          if settings.rounds > 1:
            rows = plan.rounds(home, name, cell)
            rounds.setdefault(name, {})[str(seed)] = rows
  results = {
    "task": task.name,
    "split": config.evaluate.split,
    "seeds": list(range(settings.seeds)),
    "problems": measured["sft"][0]["total"],
    "validation_problems": settings.validation_problems,
    "searched": {k: v for k, v in searched.items() if v},
    "chosen": chosen,
    "methods": [
      summarise(
        name, runs, measured["sft"], chosen.get(name), **describe(config, name)
      )
      for name, runs in measured.items()
    ],
    "contrasts": contrasts(measured),
    "rounds": rounds,
    # Of all stages together.
    "seconds": sum(
      files.read_json(path)["seconds"]
      for path in plan.directory.rglob("record.json")
    ),
  }
  written = checked(results, ComparisonResults)
  if workspace.is_chief:
    files.write_json(plan.directory / "results.json", written)
  return written


def describe(config: Config, name: str) -> dict[str, str]:
  """Returns what the report shows of a method besides its figures."""
  if name == "sft":
    return {"label": OBJECTIVES[name].label, "colour": OBJECTIVES[name].colour}
  method = get_method(name).given(config)
  return {
    "label": method.label,
    "colour": method.colour,
    "objective": method.objective,
    "granularity": method.granularity,
  }


def method_names(config: Config) -> tuple[str, ...]:
  """Returns the methods that are compared, in order.

  Raises:
    ConfigError: if one of them, or of those that go through rounds, is unknown.
  """
  for name in config.compare.round_methods:
    get_method(name, "compare.round_methods")
  names = config.compare.methods or tuple(METHODS)
  return tuple(get_method(name).name for name in names)


def learning_rates(config: Config, name: str) -> list[float]:
  """Returns the learning rates of a method's grid, rising."""
  scales = get_method(name).given(config).lr_scales
  return sorted({float(f"{config.train.lr * scale:.3g}") for scale in scales})


def best_rate(config: Config, name: str, tried: list[dict[str, Any]]) -> float:
  """Returns the rate of highest accuracy; of equals the middle one.

  Rates too low to change the policy are equally good; the middle of them is the
  furthest from where the grid ends and from where training comes apart.

  Args:
    config: settings of the comparison.
    name: of the method.
    tried: rising rates, each {"lr", "accuracy", "diverged"}; empty for a grid
      of one.

  Raises:
    ConfigError: if all of them diverged.
  """
  if not tried:
    return learning_rates(config, name)[0]
  sound = [cell for cell in tried if not cell["diverged"]]
  if not sound:
    raise ConfigError(
      f"{name} diverged with all its learning rates: lower "
      f"--config.compare.{name}.lr_scales"
    )
  highest = max(cell["accuracy"] for cell in sound)
  best = [cell["lr"] for cell in sound if cell["accuracy"] == highest]
  return best[(len(best) - 1) // 2]


def planned_cost(config: Config) -> int:
  """Returns the length of the progress bar; see `_COST`."""
  settings = config.compare
  total = settings.seeds * (_COST["sft"] + _COST["collect"])
  for name in method_names(config):
    cost = _COST.get(get_method(name).objective, _TRAINING)
    cells = settings.seeds - 1 + len(learning_rates(config, name))
    total += cells * cost
    if name in settings.round_methods:
      rounds = settings.round_seeds * (settings.rounds - 1)
      total += rounds * (cost + _COST["collect"])
  return total


def config_of_seed(config: Config, seed: int) -> Config:
  """Moves every seed but that of the split of the data; sets the budget."""
  moved = {
    section: dataclasses.replace(
      getattr(config, section), seed=getattr(config, section).seed + seed
    )
    for section in ("sft", "collect", "train")
  }
  moved["collect"] = dataclasses.replace(
    moved["collect"],
    problems=math.ceil(config.compare.share * config.collect.problems),
  )
  data = dataclasses.replace(config.data, path="")
  return dataclasses.replace(
    config, seed=config.seed + seed, data=data, **moved
  )


COMPARE = Stage(
  name="compare",
  summary="all objectives over several seeds",
  run=run,
  trains=True,
  leaves=lambda config: ("compare",),
)
