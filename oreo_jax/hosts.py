"""Several processes that run one program: who writes, and how they agree.

Every process of a run executes the same code on its own devices. One of them,
the chief, writes files and prints; what one process alone can notice (a signal,
a file on its disk) is agreed on before all of them act on it, because a process
that leaves a collective computation alone makes the others wait for ever.
"""

from __future__ import annotations

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


def to_host(tree: Any) -> Any:
  """Returns the tree as NumPy arrays, gathered over the processes."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_get(tree)
