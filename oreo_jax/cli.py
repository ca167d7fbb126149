"""The command line: flags, the mesh, several hosts, and what is printed.

    oreo run --config=configs/maze.py --workdir=runs/maze
    oreo train --config=configs/maze.py --workdir=runs/maze \
      --config.train.lr=1e-4

The only module that reads flags, starts `jax.distributed` or prints (but for
the last line of a run whose processes lose each other, see `oreo_jax.watch`).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from oreo_jax import hosts
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
_PROFILE = flags.DEFINE_string(
  "profile",
  "",
  "FIRST:LAST, steps of every training stage of which a profiler trace is "
  "written into <workdir>/<stage>/profile; short for "
  "--config.sft.profile=FIRST,LAST and --config.train.profile=FIRST,LAST.",
)
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "aot: the machine to compile for, as v5e:4x4; short for "
  "--config.aot.topology.",
)
_NUM_SLICES = flags.DEFINE_integer(
  "num_slices",
  None,
  "aot: slices of that shape; short for --config.aot.num_slices.",
)
_WHAT = flags.DEFINE_string(
  "what", None, "aot: the program; short for --config.aot.what."
)
_SEARCH = flags.DEFINE_bool(
  "search",
  None,
  "aot: try the layouts that --config.aot.* lists; short for "
  "--config.aot.search.",
)
_PROMPT = flags.DEFINE_string(
  "prompt",
  None,
  "generate: what to answer; short for --config.generate.prompt.",
)
_VALUE = flags.DEFINE_string(
  "value",
  None,
  "generate: a Hugging Face directory of a value network; short for "
  "--config.generate.value.",
)
_STRATEGY = flags.DEFINE_string(
  "strategy",
  None,
  "generate: how to answer; short for --config.generate.strategy.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Start jax.distributed: one process a host (or a GPU), addresses from the "
  "cluster (SLURM, GKE, TPU VMs), from the next three flags, or from "
  "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of process 0, the same for all processes."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes there are.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which process this is, from 0.", lower_bound=0
)
_TIMEOUTS = hosts.Timeouts()
_START_TIMEOUT = flags.DEFINE_float(
  "start_timeout",
  _TIMEOUTS.start,
  "Seconds until all processes must have come.",
  lower_bound=1,
)
_SILENCE_TIMEOUT = flags.DEFINE_float(
  "silence_timeout",
  _TIMEOUTS.silence,
  "Seconds until a process that is not heard of counts as dead.",
  lower_bound=1,
)
_HANG_TIMEOUT = flags.DEFINE_float(
  "hang_timeout",
  _TIMEOUTS.hang,
  "Seconds without a movement of any process until the run counts as hanging; "
  "longer than any compilation.",
  lower_bound=1,
)


def _usage() -> str:
  from oreo_jax.stages import STAGES

  width = max(map(len, STAGES))
  lines = [
    f"usage: oreo {' | '.join(STAGES)}  --config=FILE [--workdir=DIR] "
    "[--config.section.key=value ...]",
    *(f"  {name.ljust(width)}  {s.summary}" for name, s in STAGES.items()),
  ]
  return "\n".join(lines)


def _say(text: str, *, end: str = "\n") -> None:
  if hosts.is_chief():
    print(text, end=end, flush=True)


def _main(argv: Sequence[str]) -> None:
  from oreo_jax.stages import STAGES, Workspace

  name = argv[1] if len(argv) > 1 else ""
  if name not in STAGES or len(argv) > 2:
    given = " ".join(argv[1:]) or "nothing"
    raise app.UsageError(f"{_usage()}\ngot: {given}")
  config = _CONFIG.value
  if not isinstance(config, Config):
    raise app.UsageError(f"--config=FILE is needed\n{_usage()}")
  if _PROFILE.value:
    _set_profile(config, _PROFILE.value, name)
  logging.set_verbosity(logging.INFO)
  # Libraries below log at INFO what nobody asked for.
  logging.get_absl_handler().addFilter(_is_ours)
  import jax

  from oreo_jax.compilation import keep_programs

  if not STAGES[name].needs_devices:
    # Not to wait for an accelerator, nor to hold one that is not used.
    jax.config.update("jax_platforms", "cpu")
  else:
    keep_programs()
  # From here on; the training loop saves a step instead.
  _stop_on_sigterm()
  if _DISTRIBUTED.value:
    _start_processes()
  for flag in (_TOPOLOGY, _NUM_SLICES, _WHAT, _SEARCH):
    if flag.value is not None:
      setattr(config.aot, flag.name, flag.value)
  for flag in (_PROMPT, _VALUE, _STRATEGY):
    if flag.value is not None:
      setattr(config.generate, flag.name, flag.value)
  workspace = Workspace(
    config, checked_workdir(_WORKDIR.value or _default_workdir())
  )
  stage = STAGES[name]
  # A mesh that cannot be is refused before anything is removed.
  mesh = workspace.mesh if stage.needs_devices else None
  if _OVERWRITE.value:
    workspace.remove(stage.leaves(config))
  in_force = jax.set_mesh(mesh) if mesh is not None else None
  with in_force or contextlib.nullcontext():
    stage.run(workspace, _say)
  hosts.leave()


def _set_profile(config: Config, text: str, command: str) -> None:
  """Has the training stages of a command trace the steps that a flag names."""
  from oreo_jax.stages import STAGES

  steps = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
  if steps is None or int(steps[1]) > int(steps[2]):
    raise ConfigError(
      f"--profile={text}: expected the first and the last step of a trace, "
      "counted from 1, as in --profile=10:13"
    )
  if not STAGES[command].trains:
    trainers = ", ".join(name for name, s in STAGES.items() if s.trains)
    raise ConfigError(
      f"--profile={text}: `oreo {command}` does not train; the commands that "
      f"do are {trainers}"
    )
  config.sft.profile = config.train.profile = (int(steps[1]), int(steps[2]))


def _start_processes() -> None:
  names = hosts.start(
    _COORDINATOR.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
    timeouts=hosts.Timeouts(
      _START_TIMEOUT.value, _SILENCE_TIMEOUT.value, _HANG_TIMEOUT.value
    ),
  )
  listed = ", ".join(f"{i} on {name}" for i, name in enumerate(names[:16]))
  more = ", ..." if len(names) > 16 else ""
  _say(f"{len(names)} processes: {listed}{more}")


def _stop_on_sigterm() -> None:
  """Has a SIGTERM raise a PreemptedError in the main thread.

  A signal can arrive while Python runs a callback of its garbage collection,
  which lets no exception out. One that was lost so is raised again.
  """
  from oreo_jax.train import PreemptedError

  def raise_again(lost: sys.UnraisableHookArgs) -> None:
    if isinstance(lost.exc_value, PreemptedError):
      signal.setitimer(signal.ITIMER_REAL, 0.1)
    else:
      sys.__unraisablehook__(lost)

  signal.signal(signal.SIGTERM, _stop)
  signal.signal(signal.SIGALRM, _stop)
  sys.unraisablehook = raise_again


def _stop(unused_signal: int, unused_frame: object) -> None:
  from oreo_jax.train import PreemptedError

  raise PreemptedError(
    "the command was asked to stop; the stages that had ended are saved: run "
    "the same command again to go on"
  )


def _is_ours(record) -> bool:
  return record.levelname != "INFO" or "oreo_jax" in record.pathname


def checked_workdir(workdir: str) -> str:
  """Returns the work directory; raises a ConfigError for a bucket."""
  if "://" in workdir:
    raise ConfigError(
      f"--workdir={workdir} is not a folder: oreo relies on atomic renames, "
      "which a bucket does not have; give a file system that all hosts share "
      "(docs/launch.md)"
    )
  return workdir


def _default_workdir() -> str:
  filename = config_flags.get_config_filename(flags.FLAGS["config"])
  path = pathlib.Path(filename.split(":")[0])
  # A saved config lies in its own work directory.
  if path.name == "config.py":
    return str(path.parent)
  return str(pathlib.Path("runs") / path.stem)


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


# What a scheduler restarts on: the run was asked to stop, and is saved.
# (EX_TEMPFAIL of sysexits.h.) Errors of the user are 2, as everywhere.
_EXIT_PREEMPTED = 75


_DEFAULT_CONFIG = pathlib.Path(__file__).parent / "config" / "default.py"


def _names_config(arguments: Sequence[str]) -> bool:
  return any(re.match(r"--?config(=|$)", argument) for argument in arguments)


def main() -> None:
  """Entry point of the `oreo` command.

  Exit codes: 0, done; 2, an error that one line explains; 75, asked to stop by
  a SIGTERM with everything saved, run the same command again; 76, another
  process of the run died or hangs.
  """
  arguments = sys.argv[1:]
  try:
    if arguments[:1] == ["generate"] and not _names_config(arguments):
      # A checkpoint says all that is needed to answer a prompt.
      sys.argv.insert(2, f"--config={_DEFAULT_CONFIG}")
      arguments = sys.argv[1:]
    check_overrides(arguments)
    app.run(_main)
  except (Exception, KeyboardInterrupt) as error:
    # Ours all say what to do; a traceback would bury that.
    code = _exit_code(error)
    explained = code and not os.environ.get("OREO_TRACEBACK")
    line = f"error: {error}"
    hosts.fail(
      code or 1,
      str(error) or type(error).__name__,
      line if explained else traceback.format_exc(),
    )
    if not explained:
      raise
    print(line, file=sys.stderr)
    sys.exit(code)


# How the errors of XLA begin, which are ValueErrors and RuntimeErrors as well.
_STATUS = re.compile(
  r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|"
  r"INVALID_ARGUMENT|RESOURCE_EXHAUSTED|UNAVAILABLE|UNIMPLEMENTED|UNKNOWN): "
)


def _exit_code(error: BaseException) -> int:
  """Returns the code for an error whose message says what to do, else 0."""
  if _STATUS.match(str(error)):
    return 0
  if isinstance(error, ValueError):
    return 2
  from oreo_jax.train import DivergedError, PreemptedError

  if isinstance(error, PreemptedError):
    return _EXIT_PREEMPTED
  return 2 if isinstance(error, DivergedError) else 0
