"""launch/slurm.sbatch, on a real SLURM of one node."""

import os
import re
import subprocess
import sys
import time

import pytest
import slurm_node
import tiny_run
from tiny_run import ROOT

SCRIPT = ROOT / "launch" / "slurm.sbatch"
STEPS = 40


def test_it_is_good_shell():
  subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.parametrize("variables", [{}, {"DRY_RUN": "1"}])
def test_a_dry_run_prints_the_command(variables):
  flag = [] if variables else ["--dry-run"]
  words = ["train", "--config=x.py", "--config.evaluate.budgets=(1, 3)"]
  printed = subprocess.run(
    ["bash", SCRIPT, *flag, *words],
    env={**os.environ, "OREO": "python -m oreo_jax", **variables},
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  assert printed.strip() == (
    "srun --kill-on-bad-exit=0 --wait=120 python -m oreo_jax train "
    r"--config=x.py --config.evaluate.budgets=\(1\,\ 3\) --distributed"
  )


@pytest.mark.parametrize(
  "words, code, printed",
  [
    ([], 2, "usage: sbatch"),
    (["--help"], 0, "usage: sbatch"),
    # The script by itself, where sbatch was forgotten.
    (["train", "--config=x.py"], 2, "start it with sbatch"),
  ],
)
def test_it_says_how_it_is_used(words, code, printed):
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("SLURM_")
  }
  outcome = subprocess.run(
    ["bash", SCRIPT, *words], capture_output=True, text=True, env=environment
  )
  assert outcome.returncode == code
  output = outcome.stderr if code else outcome.stdout
  assert printed in output and "unbound" not in outcome.stderr


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm_node.missing()), reason=slurm_node.missing())
def test_a_job_that_is_preempted_goes_on_from_the_saved_step(tmp_path):
  command = tiny_run.command(tmp_path, steps=STEPS, checkpoint_every=1)
  log = tmp_path / "job.log"
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OREO": f"{sys.executable} -m oreo_jax",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  with slurm_node.started(tmp_path / "slurm") as variables:
    environment |= variables

    def slurm(*words):
      return subprocess.run(
        words, env=environment, capture_output=True, text=True, check=True
      ).stdout.strip()

    job = slurm(
      "sbatch", "--parsable", "--ntasks-per-node=2", "--gpus-per-node=0",
      f"--output={log}", str(SCRIPT), *command,
    )  # fmt: skip
    start = time.monotonic()
    wait_for(lambda: tiny_run.saved_steps(tmp_path), log)
    asked = time.monotonic()
    # What SLURM sends to the script two minutes before the time is up.
    slurm("scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: "queued again" in text_of(log), log)
    stopped = time.monotonic()
    # A job that is queued again may not start at once.
    wait_for(lambda: "restart 1" in text_of(log), log)
    again = time.monotonic()
    wait_for(lambda: not slurm("squeue", "--noheader"), log)
    done = time.monotonic()
  text = text_of(log)
  [saved] = set(re.findall(r"is saved at step (\d+)", text))
  print(
    f"seconds: first checkpoint after {asked - start:.0f}, all stopped at step "
    f"{saved} after {stopped - asked:.1f} more, started again after "
    f"{again - stopped:.0f} more, done after {done - again:.0f} more"
  )
  assert 1 <= int(saved) < STEPS
  assert "ended with exit code 75" in text
  assert re.search(rf"goes on at step {saved} of {STEPS}", text)
  assert tiny_run.saved_steps(tmp_path)[-1] == STEPS
  assert (tmp_path / "run" / "oreo" / "record.json").exists()
  assert "Traceback" not in text


def text_of(log):
  return log.read_text() if log.exists() else ""


def wait_for(condition, log, seconds=1500):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, text_of(log)[-3000:]
    time.sleep(0.5)
