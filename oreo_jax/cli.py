"""The command line: flags, the mesh, several hosts, and what is printed.

    oreo run --config=configs/maze.py --workdir=runs/maze
    oreo train --config=configs/maze.py --workdir=runs/maze \
      --config.train.lr=1e-4

The only module that reads flags, starts `jax.distributed` or prints.
"""

import contextlib
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from oreo_jax.config import Config, ConfigError, field_paths, unknown_key
from oreo_jax.settings import parse_tuple


class _TupleParser(flags.ArgumentParser):
  """Reads a tuple from the text of a flag."""

  def parse(self, argument):
    """Returns the tuple; a default comes as one already."""
    return parse_tuple(argument) if isinstance(argument, str) else argument


# With the parser of ml_collections a repeated flag adds to the tuple; with any
# other the last one counts, as it does for flags of all other types.
config_flags.register_flag_parser_for_type(tuple, _TupleParser())

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "File with get_config(); FILE:variant picks a variant."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run keeps everything; runs/<config> by default."
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Do the stage again, removing what it left."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Start jax.distributed: one process a host, addresses from the cluster "
  "(SLURM, GKE, TPU) or from JAX_COORDINATOR_ADDRESS and friends.",
)


def _sft(workspace) -> None:
  from oreo_jax.stages import pipeline

  pipeline.sft(workspace)
  _say_record(workspace, "sft")


def _collect(workspace) -> None:
  from oreo_jax.stages import pipeline

  pipeline.collect(workspace)
  _say_record(workspace, "collect")


def _train(workspace) -> None:
  from oreo_jax.stages import pipeline

  objective = workspace.config.train.objective
  pipeline.train_objective(workspace, objective)
  _say_record(workspace, objective)


def _evaluate(workspace) -> None:
  from oreo_jax import report
  from oreo_jax.stages import evaluate

  install = os.environ.get("OREO_INSTALL_SECONDS")
  results = evaluate.evaluate(
    workspace, install_s=float(install) if install else None
  )
  _say(report.format_table(results))


def _export(workspace) -> None:
  from oreo_jax.stages import pipeline

  pipeline.export(workspace)
  _say_record(workspace, "export")


def _report(workspace) -> None:
  from oreo_jax import report

  if workspace.is_chief:
    path = report.write_report(workspace.directory)
    _say(f"report: {path}")


def _run(workspace) -> None:
  from oreo_jax.stages import pipeline

  _sft(workspace)
  _collect(workspace)
  for objective in workspace.config.baselines:
    pipeline.train_objective(workspace, objective)
    _say_record(workspace, objective)
  _train(workspace)
  _evaluate(workspace)
  _report(workspace)


def _iterate(workspace) -> None:
  from oreo_jax import report
  from oreo_jax.stages import iterate

  results = iterate.iterate(workspace)
  if workspace.is_chief:
    last = workspace.directory / f"round{workspace.config.rounds}"
    _say(report.format_table(report.read_results(last)))
    _say(report.format_rounds(results["rounds"]))
    _say(f"report of the last round: {report.write_report(last)}")


def _compare(workspace) -> None:
  from oreo_jax import report
  from oreo_jax.stages import compare

  results = compare.compare(workspace)
  _say(report.format_comparison(results))
  if workspace.is_chief:
    path = report.write_comparison(workspace.directory / "compare", results)
    _say(f"report: {path}")


COMMANDS: dict[str, Callable] = {
  "sft": _sft,
  "collect": _collect,
  "train": _train,
  "evaluate": _evaluate,
  "export": _export,
  "run": _run,
  "iterate": _iterate,
  "compare": _compare,
  "report": _report,
}
_USAGE = (
  f"usage: oreo {' | '.join(COMMANDS)}  --config=FILE [--workdir=DIR] "
  "[--config.section.key=value ...]"
)


def _say(text: str) -> None:
  import jax

  if jax.process_index() == 0:
    print(text, flush=True)


def _say_record(workspace, stage: str) -> None:
  figures = [
    f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
    for key, value in _flat(workspace.record(stage)).items()
  ]
  _say(f"{stage}: " + "  ".join(figures))


def _flat(record: dict) -> dict:
  flat = {}
  for key, value in record.items():
    if key == "settings":
      continue
    flat |= value if isinstance(value, dict) else {key: value}
  return flat


def _main(argv: Sequence[str]) -> None:
  name = argv[1] if len(argv) > 1 else ""
  if name not in COMMANDS or len(argv) > 2:
    given = " ".join(argv[1:]) or "nothing"
    raise app.UsageError(f"{_USAGE}\ngot: {given}")
  config = _CONFIG.value
  if not isinstance(config, Config):
    raise app.UsageError(f"--config=FILE is needed\n{_USAGE}")
  logging.set_verbosity(logging.INFO)
  # Libraries below log at INFO what nobody asked for.
  logging.get_absl_handler().addFilter(_is_ours)
  import jax

  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  from oreo_jax.stages.workspace import Workspace

  directory = pathlib.Path(_WORKDIR.value or _default_workdir())
  if _OVERWRITE.value:
    _remove(directory, name, config)
  start = time.monotonic()
  workspace = Workspace(config, directory)
  with jax.set_mesh(workspace.mesh):
    COMMANDS[name](workspace)
  if name == "run":
    _say_timings(workspace, time.monotonic() - start)


def _is_ours(record) -> bool:
  return record.levelname != "INFO" or "oreo_jax" in record.pathname


def _say_timings(workspace, seconds: float) -> None:
  import json

  path = workspace.directory / "results.json"
  timings = json.loads(path.read_text(encoding="utf-8")).get("timings", {})
  parts = "  ".join(f"{k} {v:.0f}" for k, v in timings.items())
  _say(f"seconds: {parts}  whole command {seconds:.0f}")


def _default_workdir() -> str:
  filename = config_flags.get_config_filename(flags.FLAGS["config"])
  path = pathlib.Path(filename.split(":")[0])
  # A saved config lies in its own work directory.
  if path.name == "config.py":
    return str(path.parent)
  return str(pathlib.Path("runs") / path.stem)


def _remove(directory: pathlib.Path, command: str, config: Config) -> None:
  """Removes what the command's stages left; trajectories of others stay."""
  objective = config.train.objective
  folders = {
    "train": [objective],
    "run": [
      "sft",
      "collect",
      *config.baselines,
      objective,
      "evaluate",
      "tokenizer",
    ],
    "iterate": [f"round{number}" for number in range(config.rounds + 1)],
  }.get(command, [command])
  for folder in folders:
    with contextlib.suppress(FileNotFoundError):
      shutil.rmtree(directory / folder)


def check_overrides(arguments: Sequence[str]) -> None:
  """Raises a ConfigError for a `--config.x.y` that is not a setting.

  The flag parser would say only which part of the path it did not find.
  """
  joined = "\n".join(arguments)
  files = re.findall(r"^--?config[=\n](.+)$", joined, re.MULTILINE)
  if not files:
    return
  parser = config_flags.config_flags.ConfigFileFlagParser("config")
  try:
    config = parser.parse(files[-1])
  except ConfigError as error:
    # The parser buries the message under a traceback.
    raise ConfigError(f"{files[-1]}: {error.__context__}") from error
  if not isinstance(config, Config):
    return
  valid = field_paths(config)
  for argument in arguments:
    name = argument.lstrip("-").split("=", 1)[0]
    if argument.startswith("-") and name.startswith("config."):
      name = name.removeprefix("config.")
      if name not in valid:
        raise ConfigError(unknown_key(name, valid))


def main() -> None:
  """Entry point of the `oreo` command."""
  arguments = sys.argv[1:]
  try:
    check_overrides(arguments)
    app.run(_main)
  except (ValueError, RuntimeError) as error:
    # Ours all say what to do; a traceback would bury that.
    if os.environ.get("OREO_TRACEBACK") or not _is_plain(error):
      raise
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _is_plain(error: Exception) -> bool:
  """Whether the message alone tells the user what to do."""
  if isinstance(error, ValueError):
    return True
  from oreo_jax.train import DivergedError, PreemptedError

  return isinstance(error, DivergedError | PreemptedError)
