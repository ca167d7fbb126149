"""Rounds of collecting and training: iterative OREO (paper, figure 2).

Round k samples with the policy of round k - 1 and trains it further, with that
policy as the reference. Every round has a folder of its own:

sft/                       the policy that round 1 starts from
round<k>/config.py         its settings
round<k>/collect/          its trajectories
round<k>/<objective>/      what it trained, with its curves
round<k>/<split>/          accuracy on held-out problems; round 0 is the start
round<last>/results.json   search and values of the last round, as `evaluate`
rounds.json                the table

Any objective can be iterated, rejection sampling too. A run that was cut off
goes on where it was.
"""

from __future__ import annotations

from oreo_jax import files, report
from oreo_jax.analysis.results import ROUNDS_NAME, Rounds, checked
from oreo_jax.config import ConfigError
from oreo_jax.progress import Progress
from oreo_jax.stages.branch import Branch, Origin, measure
from oreo_jax.stages.evaluate import evaluate
from oreo_jax.stages.rounds import (
  check_rounds,
  play_round,
  round_config,
  round_row,
)
from oreo_jax.stages.sft import fine_tune
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train import get_objective


def run(workspace: Workspace, say: Say) -> None:
  """Runs the rounds, and says their table and that of the last search."""
  results = iterate(workspace)
  if workspace.is_chief:
    last = workspace.directory / f"round{workspace.config.rounds}"
    say(report.format_table(report.read_results(last)))
    say(report.format_rounds(results["rounds"]))
    say(f"report of the last round: {report.write_report(last)}")


def iterate(workspace: Workspace) -> Rounds:
  """Runs `config.rounds` rounds; returns what it wrote to `rounds.json`.

  Raises:
    ConfigError: without a task, or with settings that rounds cannot have.
  """
  config = workspace.config
  check_rounds(workspace, config.rounds)
  objective = config.train.objective
  if not get_objective(objective).trains_policy:
    raise ConfigError(
      f"config.train.objective={objective} leaves the policy as it is, so "
      "rounds of it lead nowhere: set --config.train.objective=oreo"
    )
  fine_tune(workspace)
  split = config.evaluate.split
  enabled = workspace.is_chief
  with Progress(config.rounds, "rounds", unit="round", enabled=enabled) as bar:
    start = Branch(config, workspace.directory / "round0", Origin(workspace))
    rows = [round_row(0, measure(start, "", split))]
    last = start
    for number in range(1, config.rounds + 1):
      directory = workspace.directory / f"round{number}"
      origin = Origin(last, objective) if number > 1 else Origin(workspace)
      last = Branch(round_config(config, number), directory, origin)
      rows.append(play_round(last, number))
      bar.update(accuracy=rows[-1]["accuracy"])
  evaluate(last)
  results = {
    "task": workspace.need_task("rounds need problems").name,
    "objective": objective,
    "split": split,
    "critic": config.round_critic,
    "problems": config.round_problems,
    "rounds": rows,
  }
  written = checked(results, Rounds)
  if workspace.is_chief:
    files.write_json(workspace.directory / ROUNDS_NAME, written)
  return written


ITERATE = Stage(
  name="iterate",
  summary="rounds of collecting and training",
  run=run,
  trains=True,
  leaves=lambda config: (
    *(f"round{number}" for number in range(config.rounds + 1)),
    ROUNDS_NAME,
  ),
)
