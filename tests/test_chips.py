"""The table of chips and the names jax gives them."""

import pytest

from oreo_jax import chips


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
    ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
    ("NVIDIA A100 80GB PCIe", "A100-80GB"),
    ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H200", "H200"),
  ],
)
def test_a_device_is_found_by_the_name_jax_gives_it(kind, name):
  assert chips.lookup(kind) is chips.CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "TPU v4 lite", "TPU7x", ""])
def test_an_unknown_device_has_no_chip(kind):
  assert chips.lookup(kind) is None


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda c: c.name)
def test_the_figures_of_a_chip_are_in_order(chip):
  # A slip of a power of ten in one column would break one of these: reading
  # all memory takes 10 to 50 ms, and every network is slower than the next
  # memory up.
  assert 0.005 < chip.hbm_bytes / chip.hbm_bandwidth < 0.05
  assert 100 < chip.bf16_flops / chip.hbm_bandwidth < 700
  assert chip.network_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth
