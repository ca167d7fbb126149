"""Arrays that wait in the memory of the host.

A TPU or a GPU reads the pinned memory of its host by itself, so that a compiled
program fetches what it needs where it needs it, and puts it back. What waits
there is sharded as it would be on the devices: each host holds what its own
devices work with.
"""

from __future__ import annotations

import math
from typing import Any

import jax

_KIND = "pinned_host"
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def on_host(shardings: Any) -> Any:
  """Returns shardings like these, in the memory of the hosts."""
  return jax.tree.map(lambda s: s.with_memory_kind(_KIND), shardings)


def on_devices(shardings: Any) -> Any:
  """Returns shardings like these, in the memory of the devices."""
  return jax.tree.map(lambda s: s.with_memory_kind("device"), shardings)


def waits(x: Any) -> bool:
  """Returns whether an array, or an abstract one, is in a host's memory."""
  sharding = getattr(x, "sharding", None)
  return getattr(sharding, "memory_kind", None) == _KIND


def bytes_on_device(tree: Any, *, waiting: bool = False) -> int:
  """Returns the bytes of a tree's shards on one device.

  Args:
    tree: arrays, or abstract ones, with shardings.
    waiting: count what is on the host for that device, and nothing else.
  """
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if waits(leaf) == waiting
  )


def fetch(tree: Any, *, after: Any = ()) -> Any:
  """Brings what waits on the host to the devices; for use under `jax.jit`.

  Args:
    tree: arrays; those that are on the devices are returned as they are.
    after: arrays that have to be there before anything is fetched.
  """
  if not any(map(_is_on_host, jax.tree.leaves(tree))):
    return tree
  tree, _ = jax.lax.optimization_barrier((tree, after))
  return jax.tree.map(
    lambda x: jax.device_put(x, _DEVICE) if _is_on_host(x) else x, tree
  )


def put_back(tree: Any, like: Any) -> Any:
  """Puts arrays on the host where those of `like` are; under `jax.jit`."""
  return jax.tree.map(
    lambda x, old: jax.device_put(x, _HOST) if _is_on_host(old) else x,
    tree,
    like,
  )


def _is_on_host(x: Any) -> bool:
  return jax.typeof(x).memory_space == _HOST
