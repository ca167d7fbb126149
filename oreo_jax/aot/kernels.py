"""What kernels cost, which the compiler sees from outside only.

XLA knows the arrays a kernel takes and returns, and nothing of what it does
with them. JAX's splash attention, which is the attention of a TPU
(`models.packed_attention`), passes no estimate either. Its cost follows from
the shapes, and is counted here.

The kernel works through pairs of a block of queries and a block of keys. It
skips the pairs that the causal mask or the window hides as a whole, and
computes all others in full, those on the diagonal as well. A matrix product of
one pair is 2 x block x block x H flops, of which a head makes

    forward                  2   scores, mixed values
    gradient of the queries  3   scores again, of the probabilities, of queries
    gradient of keys, values 4   scores again, of the probabilities, of both.

Heads narrower than the 128 lanes of the chip count as wide as they are, though
the chip computes 128.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from oreo_jax.aot.hlo import Computation, Instruction, Leaf

# Products of a pair of blocks, by the phase in the kernel's name.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH = re.compile(r"splash_mha_(fwd|dq|dkv)")
# The operands that all phases begin with are two tables of block pairs, then
# queries, keys, values, and the segments of queries and of keys. What follows
# belongs to the queries.
_NEXT_BLOCK, _QUERIES = 0, 2
_OF_KEYS = (3, 4, 6)


class _Splash(NamedTuple):
  """A call of the splash attention kernel."""

  phase: str  # of `_PRODUCTS`
  inputs: tuple[Leaf, ...]
  blocks: int  # of queries, and of keys, in a row
  pairs: int  # of a block of queries and one of keys that are computed


def is_kernel(instruction: Instruction) -> bool:
  """Returns whether this is a kernel that was not written by XLA."""
  return (
    instruction.opcode == "custom-call"
    and 'custom_call_target="tpu_custom_call"' in instruction.attributes
  )


def flops_of(
  computation: Computation, instruction: Instruction
) -> float | None:
  """Returns the flops of a kernel, or None if it does not say.

  Args:
    computation: that has the kernel.
    instruction: a kernel.
  """
  splash = _splash(computation, instruction)
  if splash is None:
    estimate = re.search(
      r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', instruction.attributes
    )
    return float(estimate[1]) if estimate else None
  rows, heads, length, width = _sizes(splash)
  products = _PRODUCTS[splash.phase] * rows * heads * splash.pairs
  return 2.0 * products * (length // splash.blocks) ** 2 * width


def bytes_moved(
  computation: Computation, instruction: Instruction
) -> float | None:
  """Returns the bytes between memory and cores; None for other kernels.

  Where the sums are of keys, a block of keys is held in the chip while its
  queries pass by; in the other phases a block of queries is held. What is held
  is read once, and what passes by is read once a pair.

  Args:
    computation: that has the kernel.
    instruction: a kernel.
  """
  splash = _splash(computation, instruction)
  if splash is None:
    return None
  rows, heads, _, _ = _sizes(splash)
  rank = len(splash.inputs[_QUERIES].dims)
  total = float(sum(x.bytes for x in instruction.leaves if x.space == 0))
  for place, leaf in enumerate(splash.inputs):
    if leaf.space or place < _QUERIES:
      continue
    passes_by = (place in _OF_KEYS) != (splash.phase == "dkv")
    # Some tables are the same for all rows.
    times = 1.0 if len(leaf.dims) >= rank - 1 else rows
    if len(leaf.dims) == rank:
      # Query heads that share keys read them one after the other.
      times *= heads // leaf.dims[-3] if passes_by else 1
    elif passes_by or splash.phase != "dkv":
      times *= heads  # the same for all heads, and read for each
    if splash.blocks == 1:
      times = 1.0  # the block that is there already is not read again
    if passes_by:
      times *= splash.pairs / splash.blocks
    total += leaf.bytes * times
  return total


def _sizes(splash: _Splash) -> tuple[int, int, int, int]:
  """Returns rows, query heads, length and width of the queries."""
  *rows, heads, length, width = splash.inputs[_QUERIES].dims
  return math.prod(rows), heads, length, width  # a single row has no dimension


def _splash(
  computation: Computation, instruction: Instruction
) -> _Splash | None:
  name = _SPLASH.match(instruction.name)
  if name is None:
    return None
  inputs = tuple(computation[x].leaves[0] for x in instruction.operands)
  sizes = inputs[_NEXT_BLOCK].dims[-2:]
  # One of the two is the number of blocks in a row, and the other is how many
  # partners the block with the most of them has: all, or those in the window.
  blocks, most = max(sizes), min(sizes)
  pairs = sum(min(place, most) for place in range(1, blocks + 1))
  return _Splash(name[1], inputs, blocks, pairs)
