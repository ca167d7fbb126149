"""What the makers say a chip can do: the peaks a step is measured against.

`lookup` finds a chip by the name jax gives its devices, `device_kind`. The
figures are of a whole chip and of dense arithmetic. Network figures are what
one chip can send in one direction, as a collective on one axis of a ring uses
both neighbours and each link carries both directions at once.
"""

from __future__ import annotations

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """The peaks of one chip, in units of one second and one byte."""

  name: str  # as on the price list: "v5e"
  bf16_flops: float  # multiplications and additions of bfloat16 a second
  hbm_bytes: float  # memory a program can use
  hbm_bandwidth: float  # bytes a second between memory and cores
  link_bandwidth: float  # bytes a second one way over one link to a neighbour
  ring_links: int  # links of a chip that one collective can send over
  network_bandwidth: float  # bytes a second a chip sends out of its slice
  cores: int = 1  # tensor cores; each may be a device of its own

  @property
  def ici_bandwidth(self) -> float:
    """Bytes a second that a chip sends within its slice or its node."""
    return self.link_bandwidth * self.ring_links


# Sources. TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, pages "system
# architecture", for arithmetic and memory; the scaling book
# (jax-ml.github.io/scaling-book/tpus) for the bandwidth of a link, which is
# about a tenth below the nominal one, and for what leaves a slice. Memory is
# what the compiler allows a program, a little below the nominal 16, 95 or
# 32 GB. A collective over one axis of the torus sends to both neighbours of
# that axis, so two links count, though a chip has four (v5e, v6e) or six.
# GPU: NVIDIA's data sheets of A100, H100 SXM and H200 SXM, without sparsity.
# NVLink is a switch, so it counts as one link with half of the published sum
# of both directions: 600 GB/s of A100, 900 GB/s of Hopper. What leaves a node
# assumes one network card a GPU, of 200 Gb/s (A100) or 400 Gb/s (Hopper).
CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, 31.75 * GIB, 1.2e12, 4.5e10, 2, 6.25e9, cores=2),
    Chip("v5e", 197e12, 15.75 * GIB, 8.1e11, 4.5e10, 2, 3.125e9),
    Chip("v5p", 459e12, 95.74 * GIB, 2.765e12, 9e10, 2, 6.25e9, cores=2),
    Chip("v6e", 918e12, 31.25 * GIB, 1.64e12, 9e10, 2, 12.5e9),
    Chip("A100-40GB", 312e12, 40 * GIB, 1.555e12, 3e11, 1, 2.5e10),
    Chip("A100-80GB", 312e12, 80 * GIB, 2.039e12, 3e11, 1, 2.5e10),
    Chip("H100", 989e12, 80 * GIB, 3.35e12, 4.5e11, 1, 5e10),
    Chip("H200", 989e12, 141e9, 4.8e12, 4.5e11, 1, 5e10),
  )
}

# The names jax gives, from the special to the general: "TPU v5 lite" before
# "TPU v5", which is what a v5p calls itself.
_KINDS = (
  (r"tpu v4$", "v4"),
  (r"tpu v5( lite|e)$", "v5e"),
  (r"tpu v5p?$", "v5p"),
  (r"tpu v6( lite|e)$", "v6e"),
  (r"a100.*80gb", "A100-80GB"),
  (r"a100", "A100-40GB"),
  (r"h200", "H200"),
  (r"h100", "H100"),
)


def lookup(device_kind: str) -> Chip | None:
  """Returns the chip a jax device belongs to.

  Args:
    device_kind: what `jax.devices()[0].device_kind` says, such as
      "TPU v5 lite" or "NVIDIA H100 80GB HBM3".

  Returns:
    The chip, or None where the table does not know it: a CPU has no peak that
    a step could fairly be measured against.
  """
  for pattern, name in _KINDS:
    if re.search(pattern, device_kind, re.IGNORECASE):
      return CHIPS[name]
  return None
