"""The least time a program can take: the slowest of what it must do.

Arithmetic, memory and networks work side by side at best, so a step takes at
least as long as the one of them that is busy longest:

    t >= max(flops / peak, bytes / HBM, sent / ICI, sent / network).

The share of the peak that is then left for the mathematics (MFU) is an upper
bound for what a run can reach, and the term that is largest says what to
change.
"""

from __future__ import annotations

from typing import NamedTuple

from oreo_jax.aot.costs import Costs
from oreo_jax.chips import Chip


class Roofline(NamedTuple):
  """Seconds of one call on one device, by what is busy."""

  compute_s: float
  hbm_s: float
  ici_s: float  # links within a slice or a node
  network_s: float  # between slices
  mfu: float  # of the slowest, over all devices

  @property
  def step_s(self) -> float:
    """The time of the slowest."""
    return max(self.compute_s, self.hbm_s, self.ici_s, self.network_s)

  @property
  def bound(self) -> str:
    """The name of the slowest."""
    times = {
      "compute": self.compute_s,
      "HBM": self.hbm_s,
      "interconnect": self.ici_s,
      "network between slices": self.network_s,
    }
    return max(times, key=lambda name: times[name])


def make_roofline(
  costs: Costs,
  chip: Chip,
  *,
  model_flops: float,
  devices: int,
  devices_per_chip: int = 1,
) -> Roofline:
  """Divides what a device does by what it could do.

  Args:
    costs: of one device.
    chip: its peaks.
    model_flops: of the whole step, over all devices.
    devices: of the mesh.
    devices_per_chip: that share a chip's peaks.
  """
  sent = {False: 0.0, True: 0.0}
  for collective in costs.collectives:
    sent[collective.crosses_slices] += collective.sent
  share = 1 / devices_per_chip
  peak = chip.bf16_flops * share
  roofline = Roofline(
    compute_s=costs.flops / peak,
    hbm_s=costs.hbm_bytes / (chip.hbm_bandwidth * share),
    ici_s=sent[False] / (chip.ici_bandwidth * share),
    network_s=sent[True] / (chip.network_bandwidth * share),
    mfu=0.0,
  )
  available = devices * peak * roofline.step_s
  return roofline._replace(mfu=model_flops / available if available else 0.0)
