"""Several real processes over loopback, as a cluster would start them."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]

_START = """
import sys
import jax

address, count, index = sys.argv[1:4]
jax.config.update("jax_numpy_dtype_promotion", "strict")
if int(count) > 1:  # one process alone needs no network
  # A machine that is busy may stand still for longer than jax has patience.
  jax.distributed.initialize(
    address, int(count), int(index), heartbeat_timeout_seconds=600
  )
"""


@contextlib.contextmanager
def started(script, *arguments, processes, devices):
  """Runs a script on each of several processes; kills what is left of them.

  Args:
    script: Python; `sys.argv[4:]` are the arguments.
    *arguments: the same for every process.
    processes: how many.
    devices: simulated ones of each.

  Yields:
    The `subprocess.Popen` of each, in order.
  """
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  # The flags of the tests; of two counts the last one holds.
  count = f"--xla_force_host_platform_device_count={devices}"
  flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
  paths = [str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")]
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": flags,
    "PYTHONPATH": os.pathsep.join(paths),
  }
  tasks = [
    subprocess.Popen(
      [sys.executable, "-c", _START + script]
      + [address, str(processes), str(index), *map(str, arguments)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(processes)
  ]
  try:
    yield tasks
  finally:
    for task in tasks:
      task.kill()
      task.communicate()


def run(script, *arguments, processes, devices, timeout=300):
  """Runs a script as `started` does and returns what each printed."""
  with started(
    script, *arguments, processes=processes, devices=devices
  ) as tasks:
    outputs = [task.communicate(timeout=timeout)[0] for task in tasks]
    for task, output in zip(tasks, outputs, strict=True):
      assert task.returncode == 0, output[-3000:]
  return outputs
