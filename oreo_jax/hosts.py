"""Several processes that run one program: who writes, and how they agree.

Every process of a run executes the same code on its own devices. One of them,
the chief, writes files and prints; what one process alone can notice (a signal,
a file on its disk) is agreed on before all of them act on it, because a process
that leaves a collective computation alone makes the others wait for ever.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import jax
import numpy as np

from oreo_jax.settings import ConfigError
from oreo_jax.watch import Timeouts, Watch, announce

# The watch of this process; None where it is the only one.
_watch: Watch | None = None


def start(
  coordinator: str = "",
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeouts: Timeouts | None = None,
) -> list[str]:
  """Joins the processes of this run; call it before anything uses a device.

  What is not given comes from `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`
  and `JAX_PROCESS_ID`, or else from the cluster (SLURM, GKE, TPU VMs, Open
  MPI).

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    timeouts: when waiting for the others ends; by default as in `Timeouts`.

  Returns:
    The host of each process.

  Raises:
    ConfigError: if something is missing or wrong, or not all of them come.
  """
  global _watch
  timeouts = timeouts or Timeouts()
  # jax reads the first of these variables, and not the other two.
  given = (
    coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None,
    _number(num_processes, "JAX_NUM_PROCESSES"),
    _number(process_id, "JAX_PROCESS_ID"),
  )
  coordinator, count, process, local_devices = _detected(*given, timeouts.start)
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise ConfigError(
      f"the coordinator is {coordinator!r}, expected HOST:PORT: mend "
      "--coordinator or JAX_COORDINATOR_ADDRESS"
    )
  if not 0 <= process < count:
    raise ConfigError(
      f"this is process {process} of {count}, expected 0 to {count - 1}: mend "
      "--process_id and --num_processes"
    )
  address = host.strip("[]"), watch_port(int(port))
  watch = Watch(address, count, process, timeouts)
  names = watch.meet()
  # A SIGTERM is the business of the training loop and of `cli`; jax's service
  # would take it, and stages that do not ask that service would go on.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator,
      count,
      process,
      local_device_ids=local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=int(timeouts.start),
      # The watch names the host, so it must be the first to notice.
      heartbeat_timeout_seconds=int(timeouts.silence) + 40,
    )
  except Exception as error:
    raise ConfigError(
      f"jax.distributed did not start with the coordinator {coordinator}: "
      f"{error}. Check that the port is free on that host"
    ) from error
  _watch = watch
  return names


def watch_port(port: int) -> int:
  """Returns the port of the watch, for the coordinator's.

  The ports that jax takes under SLURM and GKE are far up; that of the watch is
  then below those which a system gives to outgoing connections.
  """
  return port - 32768 if port >= 40000 else port + 4096


def _number(value: int | None, variable: str) -> int | None:
  text = os.environ.get(variable)
  if value is not None or not text:
    return value
  try:
    return int(text)
  except ValueError as error:
    raise ConfigError(
      f"{variable} is {text!r}, expected a whole number"
    ) from error


def _detected(
  coordinator: str | None,
  count: int | None,
  process: int | None,
  timeout: float,
) -> tuple[str, int, int, list[int] | None]:
  """Fills in what the cluster knows, as `jax.distributed.initialize` does.

  That function would do so itself, but does not say what it found, and the
  processes have to meet before it: it aborts those whose peers do not come.
  """
  from jax._src.clusters import ClusterEnv

  text = os.environ.get("JAX_LOCAL_DEVICE_IDS")
  devices = [int(word) for word in text.split(",")] if text else None
  if None in (coordinator, count, process):
    try:
      coordinator, count, process, local = (
        ClusterEnv.auto_detect_unset_distributed_params(
          coordinator, count, process, devices, None, int(timeout)
        )
      )
      devices = list(local) if local is not None else None
    except Exception as error:
      raise ConfigError(
        f"the cluster does not say who the processes are: {error}. Give "
        "--coordinator=HOST:PORT --num_processes=N --process_id=I instead"
      ) from error
  missing = [
    name
    for name, value in (
      ("--coordinator=HOST:PORT or JAX_COORDINATOR_ADDRESS", coordinator),
      ("--num_processes=N or JAX_NUM_PROCESSES", count),
      ("--process_id=I or JAX_PROCESS_ID", process),
    )
    if value is None
  ]
  if coordinator is None or count is None or process is None:
    raise ConfigError(
      "--distributed found no cluster (SLURM, GKE, TPU VMs, Open MPI) to ask: "
      f"give {'; '.join(missing)}"
    )
  return coordinator, count, process, devices


def leave() -> None:
  """Returns once all processes have done their work; call it at the end.

  Until then a process that dies or fails ends this one too.
  """
  if _watch is not None:
    _watch.leave()


def fail(code: int, message: str, details: str) -> None:
  """Ends all processes because this one has failed; does nothing to one alone.

  What made it fail may be the death of another one: then it prints that, and
  ends with the exit code for it.

  Args:
    code: its exit code.
    message: what went wrong, for the others.
    details: what this one prints of it.
  """
  if _watch is None:
    return
  verdict = _watch.fail(code, message)
  # All of them may have ended for one reason, as after a notice to stop.
  same = verdict.message.endswith(f"failed: {message}")
  if verdict.process == jax.process_index() or (same and is_chief()):
    print(details, file=sys.stderr)
  elif not same:
    announce(verdict)
  sys.stdout.flush()
  sys.stderr.flush()
  # jax's own farewell would wait for processes that do not come any more.
  os._exit(verdict.code)


def _mark(event: str) -> None:
  if _watch is not None:
    _watch.mark(event)


def is_chief() -> bool:
  """Returns whether this process is the one that writes files and prints."""
  return jax.process_index() == 0


def wait_for_all(event: str) -> None:
  """Returns once every process has come to this event."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    _mark(event)
    multihost_utils.sync_global_devices(event)


def any_of(flag: bool) -> bool:
  """Returns whether the flag is set on any process; a barrier for all."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

  _mark("a question to all")
  flags = multihost_utils.process_allgather(np.asarray(flag, np.int32))
  return bool(np.max(flags))


class StopAgreement:
  """Lets all processes stop after the same step when one of them has to.

  To ask is to wait for the slowest process and for every step under way, so
  the processes ask only now and then, about every `seconds`. They must not
  differ in when: the number of steps to the next question is worked out from
  the pace of the slowest process, which they tell each other with the answer.
  A notice of preemption comes half a minute ahead or more.
  """

  def __init__(self, seconds: float = 2.0):
    """Asks first after the first step, then about every `seconds`."""
    self._seconds = seconds
    self._interval = 1  # steps between two questions
    self._asked: tuple[int, float] | None = None  # step and time, the last
    self._pace = seconds  # seconds a step, on this process

  def reached(self, step: int, flag: bool, results: Any = None) -> bool:
    """Returns whether to stop after this step, the same on every process.

    Args:
      step: steps done; every process calls this after the same steps.
      flag: whether this process has been asked to stop.
      results: arrays of the step, which are waited for before the question:
        on CPU devices two computations over several processes must not run
        at once, they could wait for each other's threads.
    """
    if jax.process_count() == 1:
      return flag
    _mark(f"step {step}")
    if self._asked is not None and step < self._asked[0] + self._interval:
      return False
    from jax.experimental import multihost_utils

    jax.block_until_ready(results)
    mine = np.asarray([flag, self._pace], np.float32)
    flags, paces = multihost_utils.process_allgather(mine).T
    # Nothing but what was gathered may decide on the next question. Doubling
    # at most: a few quick steps must not put it off for long.
    steps = int(self._seconds / max(float(np.max(paces)), 1e-6))
    self._interval = min(max(steps, 1), 2 * self._interval)
    now = time.perf_counter()
    if self._asked is not None:
      # From answer to answer: all the steps between have run by then, and have
      # not only been handed out to the devices.
      self._pace = (now - self._asked[1]) / (step - self._asked[0])
    self._asked = step, now
    return bool(np.any(flags))


def to_host(tree: Any) -> Any:
  """Returns the tree as NumPy arrays, gathered over the processes."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    _mark("the gathering of arrays")
    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_get(tree)


def share_of(count: int) -> range:
  """Returns which of `count` things this process does; each is someone's."""
  return range(jax.process_index(), count, jax.process_count())


def gather(value: Any) -> list[Any]:
  """Returns what each process has to say, in their order, to all of them.

  Args:
    value: plain JSON; it may be of another length on every process.
  """
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  _mark("the gathering of figures")
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  # Arrays are gathered, of one shape on all processes: fill up to the longest.
  lengths = multihost_utils.process_allgather(np.asarray(len(text), np.int32))
  padded = np.zeros(int(np.max(lengths)), np.uint8)
  padded[: len(text)] = text
  texts = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:length].tobytes())
    for row, length in zip(texts, lengths, strict=True)
  ]
