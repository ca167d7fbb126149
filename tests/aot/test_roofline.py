"""The least time of a step, by hand."""

import pytest

from oreo_jax.aot import costs, roofline
from oreo_jax.chips import Chip

CHIP = Chip("made up", 1e12, 1e9, 1e11, 1e9, 2, 1e8)


def collective(sent, crosses=False):
  return costs.Collective(
    "all-gather", sent, sent, 1.0, 4, crosses, "", "f32[1]"
  )


def make(flops=1e9, hbm=1e7, sent=(), per_chip=1):
  counted = costs.Costs(flops, hbm, tuple(sent), (), 0)
  return roofline.make_roofline(
    counted, CHIP, model_flops=2e9, devices=4, devices_per_chip=per_chip
  )


@pytest.mark.parametrize(
  ("arguments", "bound", "step_s"),
  [
    ({}, "compute", 1e-3),
    ({"hbm": 5e8}, "HBM", 5e-3),
    ({"sent": [collective(4e6), collective(4e6)]}, "interconnect", 4e-3),
    ({"sent": [collective(1e6, True)]}, "network between slices", 1e-2),
  ],
)
def test_the_slowest_sets_the_time(arguments, bound, step_s):
  line = make(**arguments)
  assert line.bound == bound
  assert line.step_s == pytest.approx(step_s)
  # 2e9 model flops over four devices of 1e12 a second.
  assert line.mfu == pytest.approx(2e9 / (4 * 1e12 * step_s))


def test_devices_of_one_chip_share_its_peaks():
  assert make(per_chip=2).compute_s == pytest.approx(2e-3)
  # Half a chip each: the same flops on half as many peaks.
  assert make(per_chip=2).mfu == pytest.approx(2e9 / (4 * 0.5e12 * 2e-3))


def test_a_program_that_does_nothing_has_no_time():
  line = make(flops=0.0, hbm=0.0)
  assert line.step_s == 0.0 and line.mfu == 0.0
