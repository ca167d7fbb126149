"""Running a benchmark as its reader does, in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def report_of(script, *options):
  """Returns the JSON that `benchmarks/SCRIPT` prints for `--size=tiny`."""
  ended = subprocess.run(
    [sys.executable, ROOT / "benchmarks" / script, "--size=tiny", *options],
    capture_output=True,
    text=True,
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
  )
  assert ended.returncode == 0, ended.stderr[-3000:]
  return json.loads(ended.stdout)
