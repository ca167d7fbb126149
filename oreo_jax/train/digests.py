"""A number that says whether an array still has every one of its bits.

The digest of an array is a sum, over its elements, of a scrambled mixture of
the element's bits and its place. A sum does not care about order, so every
device adds up its own shard and the sums are added: no host ever holds the
array, and the digest is the same on any mesh. One changed element always
changes the digest, because the scrambling is one to one; more than one go
unnoticed once in 2^64.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from oreo_jax import memory
from oreo_jax.sharding import replicated

# Any two odd numbers give two sums that have nothing to do with each other.
_SEEDS = (0x9E3779B1, 0x85EBCA77)


def array_digests(tree: Any) -> dict[str, str]:
  """Returns what each array of a tree is, by its path.

  On several processes all of them call this, with the same tree.

  Args:
    tree: arrays, sharded in any way.

  Returns:
    "float32[2,3] 0123456789abcdef" by path: type, shape and digest.
  """
  digests = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    # One after the other: nothing orders the sums of different arrays, and on
    # CPU devices collectives that run at once can wait for each other's
    # threads for ever.
    first, second = jax.device_get(_sums_of(leaf))
    digest = f"{kind_of(leaf)} {first:08x}{second:08x}"
    digests[jax.tree_util.keystr(path)] = digest
  return digests


def kind_of(leaf: Any) -> str:
  """Returns type and shape of an array (or of its shape alone), as text."""
  return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _sums_of(leaf: jax.Array) -> jax.Array:
  if memory.waits(leaf):
    leaf = jax.device_put(leaf, memory.on_devices(leaf.sharding))
  sharding = getattr(leaf, "sharding", None)
  everywhere = None
  if isinstance(sharding, NamedSharding):
    everywhere = replicated(sharding.mesh)
  return _compiled(everywhere)(leaf)


@functools.cache
def _compiled(everywhere: NamedSharding | None) -> Any:
  # One compilation a shape: the layers are stacked, so there are few shapes.
  return jax.jit(fold_bits, out_shardings=everywhere)


def fold_bits(x: jax.Array) -> jax.Array:
  """Returns u32[2], two independent sums over the bits of an array.

  sum_i mix(bits_i xor mix(place_i + seed)) mod 2^32, for two seeds, where
  bits_i are 32 bits of the array (narrower elements are widened, wider ones
  are several) and place_i counts them in row-major order, mod 2^32.

  Args:
    x: array of booleans, integers or floats, of 8 bits an element or more.
  """
  bits = _bits(x)
  place = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place = place * jnp.uint32(size % 2**32) + along
  return jnp.stack(
    [
      jnp.sum(_mix(bits ^ _mix(place + jnp.uint32(s))), dtype=jnp.uint32)
      for s in _SEEDS
    ]
  )


def _bits(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  # An element of 64 bits becomes two of 32 along a new last axis.
  width = min(x.dtype.itemsize, 4)
  unsigned = jnp.dtype(f"uint{8 * width}")
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """Scrambles 32 bits, one to one: MurmurHash3's last step."""
  x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> jnp.uint32(16))
