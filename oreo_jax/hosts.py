"""Several processes that run one program: who writes, and how they agree.

Every process of a run executes the same code on its own devices. One of them,
the chief, writes files and prints; what one process alone can notice (a signal,
a file on its disk) is agreed on before all of them act on it, because a process
that leaves a collective computation alone makes the others wait for ever.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np


def start() -> None:
  """Joins the processes of this run; call it before anything uses a device.

  Addresses come from the cluster (SLURM, GKE, TPU VMs) or from
  `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
  """
  jax.distributed.initialize()


def is_chief() -> bool:
  """Returns whether this process is the one that writes files and prints."""
  return jax.process_index() == 0


def wait_for_all(event: str) -> None:
  """Returns once every process has come to this event."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(event)


def any_of(flag: bool) -> bool:
  """Returns whether the flag is set on any process; a barrier for all."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

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

    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_get(tree)
