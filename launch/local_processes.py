"""Runs an `oreo` command as several processes on this machine.

  python launch/local_processes.py --processes=2 --devices=2 -- \
    run --config=configs/maze.py --workdir=runs/two

Each process gets simulated CPU devices of its own, so that what a cluster does
can be tried on a laptop. Process 0 prints here; the others write a log each.
A SIGTERM or Ctrl-C is passed on as SIGTERM (oreo saves a step and ends with
exit code 75), a second one kills. When one process fails, all end, and its rank
and its log are named.
"""

import argparse
import os
import pathlib
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time

# Seconds until the processes that are left are asked to stop, and then killed.
_GRACE_S = 30.0
# How `oreo` ends where another process of its run has died; never the cause.
_LOST_ANOTHER = 76


def parse_arguments(arguments=None):
  """Returns the flags; `command` is what `oreo` is to do."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument(
    "--devices", type=int, default=1, help="simulated CPU devices of each"
  )
  parser.add_argument(
    "--port", type=int, default=0, help="of process 0; by default a free one"
  )
  parser.add_argument(
    "--logs", type=pathlib.Path, help="folder for process1.log and so on"
  )
  parser.add_argument(
    "--dry-run", action="store_true", help="print the commands and do nothing"
  )
  parser.add_argument(
    "command", nargs="+", help="after --: an oreo command with its flags"
  )
  options = parser.parse_args(arguments)
  if options.processes < 1 or options.devices < 1:
    parser.error("--processes and --devices must be at least 1")
  return options


def free_port() -> int:
  """Returns a port that is free, as is the one of oreo's watch beside it."""
  while True:
    # Below the ports that the system gives to outgoing connections.
    port = random.randrange(20_000, 28_000)
    try:
      for number in (port, port + 4096):
        with socket.create_server(("localhost", number)):
          pass
    except OSError:
      continue
    return port


def command_of(options, port, process) -> list[str]:
  """Returns the command of one process."""
  return [
    *(sys.executable, "-m", "oreo_jax"),
    *options.command,
    "--distributed",
    f"--coordinator=localhost:{port}",
    f"--num_processes={options.processes}",
    f"--process_id={process}",
  ]


def variables_of(options) -> dict[str, str]:
  """Returns the environment variables that the processes get on top."""
  devices = f"--xla_force_host_platform_device_count={options.devices}"
  given = os.environ.get("XLA_FLAGS", "")
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{given} {devices}".strip()}


def main() -> int:
  """Starts the processes and waits for them; returns the exit code."""
  options = parse_arguments()
  port = options.port or free_port()
  variables = variables_of(options)
  commands = [
    command_of(options, port, process) for process in range(options.processes)
  ]
  if options.dry_run:
    words = [f"{name}={value}" for name, value in variables.items()]
    for command in commands:
      print(shlex.join(["env", *words, *command]))
    return 0
  logs = options.logs or pathlib.Path(tempfile.mkdtemp(prefix="oreo_logs_"))
  logs.mkdir(parents=True, exist_ok=True)
  print(f"logs of processes 1 to {options.processes - 1}: {logs}", flush=True)
  children: list[subprocess.Popen] = []
  signals: list[int] = []

  def forward(number, unused_frame):
    signals.append(number)
    for child in children:
      if child.poll() is None:
        child.send_signal(
          signal.SIGTERM if len(signals) == 1 else signal.SIGKILL
        )

  signal.signal(signal.SIGTERM, forward)
  signal.signal(signal.SIGINT, forward)
  for process, command in enumerate(commands):
    log = None if process == 0 else open(logs / f"process{process}.log", "w")
    children.append(
      subprocess.Popen(
        command,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log and subprocess.STDOUT,
        # A Ctrl-C would reach them past `forward`.
        start_new_session=True,
      )
    )
    if log:
      log.close()
    if signals:  # one that came before this child was there
      children[-1].send_signal(signal.SIGTERM)
  return wait(children, logs)


def wait(children, logs) -> int:
  """Returns the code of the first that failed, once all have ended.

  A process that ends because another has died can be gone before that one,
  whose memory is still being cleared: it counts if there is no other cause.
  """
  failed: list[tuple[int, int]] = []
  deadline = float("inf")
  running = dict(enumerate(children))
  while running:
    time.sleep(0.1)
    for process in [
      p for p, child in running.items() if child.poll() is not None
    ]:
      code = running.pop(process).returncode
      if not code:
        continue
      if not failed:
        deadline = time.monotonic() + _GRACE_S
      failed.append((process, code))
    if time.monotonic() > deadline:
      for process, child in running.items():
        print(f"process {process} has not ended: killed", file=sys.stderr)
        child.kill()
      deadline = float("inf")
  if not failed:
    return 0
  causes = [end for end in failed if end[1] != _LOST_ANOTHER]
  process, code = (causes or failed)[0]
  report(process, code, logs)
  # A shell calls the end by signal n 128 + n.
  return code if code > 0 else 128 - code


def report(process, code, logs) -> None:
  """Says which process ended first, how, and what it printed last."""
  how = (
    f"was killed by {signal.Signals(-code).name}"
    if code < 0
    else f"ended with exit code {code}"
  )
  where = "above" if process == 0 else logs / f"process{process}.log"
  print(f"process {process} {how}; its log: {where}", file=sys.stderr)
  if process:
    text = where.read_text("utf-8", errors="replace")
    for line in text.splitlines()[-10:]:
      print(f"  {process}| {line}", file=sys.stderr)
  sys.stderr.flush()


if __name__ == "__main__":
  sys.exit(main())
