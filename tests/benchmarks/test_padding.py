"""The least number of rows that benchmarks/padding.py compares packing with."""

import pathlib
import sys

import numpy as np
import pytest

from oreo_jax.data.packing import plan_rows

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import padding


@pytest.mark.parametrize(
  "slots, rows",
  [
    ([10], 1),
    ([5, 5], 1),
    ([6, 4], 1),
    ([6, 6, 6], 3),  # no two of them share a row, though 18 slots fit in two
    ([7, 7, 4, 4], 3),  # nor does a 4 fit beside a 7
    ([9, 2, 2, 2], 2),
    ([3, 3, 3, 1], 1),
  ],
)
def test_rows_that_no_packing_goes_below(slots, rows):
  assert padding.least_rows(np.array(slots), 10) == rows


def test_the_packer_is_never_below():
  rng = np.random.default_rng(0)
  for _ in range(50):
    slots = rng.integers(1, 21, 60)
    plan = plan_rows(slots, np.arange(60), row_length=20)
    least = padding.least_rows(slots, 20)
    assert least <= plan.num_rows <= 1.25 * least
