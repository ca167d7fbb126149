"""launch/local_processes.py, with real processes."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import tiny_run
from oracles import runs
from tiny_run import ROOT

from oreo_jax.config import EvaluateConfig, save_config
from oreo_jax.watch.judge import EXIT_LOST

SCRIPT = ROOT / "launch" / "local_processes.py"
_spec = importlib.util.spec_from_file_location("local_processes", SCRIPT)
local_processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(local_processes)


def launch(*arguments, **options):
  """Starts the launcher."""
  variables = {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  return subprocess.Popen(
    [sys.executable, str(SCRIPT), *map(str, arguments)],
    env={**os.environ, **variables},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **options,
  )


def run(*arguments, timeout=600):
  """Runs the launcher to its end; returns its code and what it printed."""
  with launch(*arguments) as process:
    try:
      output, _ = process.communicate(timeout=timeout)
    finally:
      process.kill()
  return process.returncode, output


def test_a_dry_run_prints_the_command_of_each_process():
  code, output = run(
    "--processes=3", "--devices=4", "--port=21000", "--dry-run", "--", "train",
    "--config=x.py", "--config.evaluate.budgets=(1, 3)",
  )  # fmt: skip
  assert code == 0
  lines = [shlex.split(line) for line in output.splitlines()]
  assert len(lines) == 3
  for process, words in enumerate(lines):
    assert words[:3] == [
      "env",
      "JAX_PLATFORMS=cpu",
      "XLA_FLAGS=--xla_force_host_platform_device_count=4",
    ]
    assert words[4:6] == ["-m", "oreo_jax"]
    assert words[6:] == [
      "train",
      "--config=x.py",
      "--config.evaluate.budgets=(1, 3)",
      "--distributed",
      "--coordinator=localhost:21000",
      "--num_processes=3",
      f"--process_id={process}",
    ]


@pytest.mark.parametrize(
  "arguments", [["--processes=2"], ["--processes=0", "x"]]
)
def test_wrong_flags_are_refused(arguments):
  code, output = run(*arguments)
  assert code == 2 and "usage:" in output


def test_a_process_that_fails_is_named_and_its_code_returned(tmp_path):
  # The command line refuses it before anything heavy is imported.
  code, output = run(
    "--processes=2", f"--logs={tmp_path}", "--", "train",
    f"--config={ROOT / 'configs' / 'maze.py'}", "--config.train.lrr=1",
  )  # fmt: skip
  assert code == 2
  assert re.search(r"process [01] ended with exit code 2; its log: ", output)
  assert "did you mean config.train.lr?" in output
  assert "config.train.lr?" in (tmp_path / "process1.log").read_text()


@pytest.mark.slow
def test_two_processes_run_a_command_to_its_end(tmp_path):
  command = tiny_run.command(tmp_path, steps=3, checkpoint_every=0)
  code, output = run("--devices=2", "--", *command)
  assert code == 0, output[-3000:]
  assert "2 processes: 0 on " in output
  assert tiny_run.saved_steps(tmp_path) == [3]
  assert (tmp_path / "run" / "oreo" / "record.json").exists()


@pytest.mark.slow
def test_all_stages_end_well_on_both_processes(tmp_path):
  # Process 1 used to look for results.json before process 0 had written it.
  evaluation = EvaluateConfig(
    problems=4, budgets=(1,), value_problems=2, value_samples=2,
    max_new_tokens=10, max_step_tokens=4, batch_size=8,
  )  # fmt: skip
  save_config(runs.tiny_run(evaluate=evaluation), tmp_path / "tiny.py")
  code, output = run(
    f"--logs={tmp_path}", "--", "run", f"--config={tmp_path / 'tiny.py'}",
    f"--workdir={tmp_path / 'run'}", timeout=1800,
  )  # fmt: skip
  assert code == 0, output[-3000:]
  assert "seconds: " in output and "report: " in output
  assert (tmp_path / "run" / "results.json").exists()
  assert "Traceback" not in (tmp_path / "process1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_ends_the_other_which_names_it(tmp_path, victim):
  command = tiny_run.command(tmp_path, steps=10_000, checkpoint_every=2)
  with launch(f"--logs={tmp_path}", "--", *command) as launcher:
    try:
      wait_for_a_checkpoint(launcher, tmp_path)
      os.kill(child(launcher.pid, victim), signal.SIGKILL)
      start = time.monotonic()
      output, _ = launcher.communicate(timeout=120)
    finally:
      launcher.send_signal(signal.SIGTERM)
  # docs/launch.md: at once, and after the grace of the launcher at the latest.
  assert time.monotonic() - start < 60
  assert launcher.returncode == 128 + signal.SIGKILL
  assert f"process {victim} was killed by SIGKILL; its log:" in output
  log = (tmp_path / "process1.log").read_text()
  survivor = output if victim else log
  assert re.search(rf"error: process {victim} \(host .*\) died:", survivor)


@pytest.mark.slow
def test_a_sigterm_to_one_process_saves_and_ends_both(tmp_path):
  command = tiny_run.command(tmp_path, steps=10_000, checkpoint_every=2)
  with launch(f"--logs={tmp_path}", "--", *command) as launcher:
    try:
      wait_for_a_checkpoint(launcher, tmp_path)
      os.kill(child(launcher.pid, 1), signal.SIGTERM)
      output, _ = launcher.communicate(timeout=300)
    finally:
      launcher.send_signal(signal.SIGTERM)
  assert launcher.returncode == 75
  # Each line of it is said once, by process 0 for all.
  [saved] = re.findall(r"^error: oreo .* is saved at step (\d+)", output, re.M)
  assert int(saved) == tiny_run.saved_steps(tmp_path)[-1]
  assert "Traceback" not in output + (tmp_path / "process1.log").read_text()


def wait_for_a_checkpoint(launcher, directory):
  """Returns once the processes of a launcher have saved a step."""
  deadline = time.monotonic() + 900
  while not tiny_run.saved_steps(directory):
    assert time.monotonic() < deadline and launcher.poll() is None
    time.sleep(0.2)


def child(launcher, process):
  """Returns the pid of a process that the launcher started."""
  for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
      parent = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1]
      words = open(f"/proc/{pid}/cmdline").read().split("\0")
    except OSError:
      continue
    if int(parent) == launcher and f"--process_id={process}" in words:
      return int(pid)
  raise AssertionError(f"process {process} of {launcher} is not running")


def test_the_cause_is_not_the_process_that_another_has_left(tmp_path):
  # Process 0 notices the death of process 1 before the operating system has
  # cleared that one away.
  script = (
    "import os, signal, time\n"
    "if os.environ['JAX_PROCESS_ID'] == '0': "
    f"raise SystemExit({EXIT_LOST})\n"
    "time.sleep(1)\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  (tmp_path / "process1.log").touch()
  children = [
    subprocess.Popen(
      [sys.executable, "-c", script],
      env={**os.environ, "JAX_PROCESS_ID": str(process)},
    )
    for process in range(2)
  ]
  assert local_processes.wait(children, tmp_path) == 128 + signal.SIGKILL
