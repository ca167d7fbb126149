import doctest
import math

import numpy as np
import pytest
from scipy import stats

from oreo_jax.analysis import statistics


def test_doctests():
  result = doctest.testmod(
    statistics, extraglobs={"np": np}, raise_on_error=False
  )
  assert result.attempted >= 2
  assert result.failed == 0


@pytest.mark.parametrize(
  "correct, total", [(0, 5), (5, 5), (3, 7), (810, 1000)]
)
def test_wilson_solves_its_equation(correct, total):
  # The ends are the rates p at which the score test just rejects:
  # (correct/total - p)^2 = z^2 p (1 - p) / total.
  z = 1.959963984540054
  for p in statistics.wilson_interval(correct, total):
    assert (correct / total - p) ** 2 == pytest.approx(
      z**2 * p * (1 - p) / total, abs=1e-12
    )


def test_wilson_by_hand_and_width():
  assert statistics.wilson_interval(5, 10) == pytest.approx(
    (0.2366, 0.7634), abs=1e-4
  )
  low, high = statistics.wilson_interval(5, 10, confidence=0.5)
  assert 0.2366 < low < 0.5 < high < 0.7634


@pytest.mark.parametrize("correct, total", [(-1, 4), (5, 4), (0, 0)])
def test_wilson_rejects_bad_counts(correct, total):
  with pytest.raises(ValueError, match="correct <= total"):
    statistics.wilson_interval(correct, total)


def test_calibration_bins_by_hand():
  # From -0.2 to 1.4 in steps of 0.4.
  result = statistics.calibration_bins(
    np.array([-0.2, 0.1, 0.3, 0.95, 1.1, 1.4]),
    np.array([0, 1, 0, 1, 1, 0]),
    bins=4,
  )
  np.testing.assert_allclose(result.predicted, [-0.05, 0.3, 0.95, 1.25])
  np.testing.assert_allclose(result.observed, [0.5, 0.0, 1.0, 0.5])
  np.testing.assert_array_equal(result.counts, [2, 1, 1, 2])


def test_calibration_bins_lie_where_the_predictions_are():
  # Values of rewards in {0, 10}: bins over [0, 1] put all but the lowest into
  # one.
  predicted = np.linspace(0.5, 9.5, 100)
  result = statistics.calibration_bins(predicted, predicted > 5, bins=10)
  np.testing.assert_array_equal(result.counts, np.full(10, 10))
  shifted = statistics.calibration_bins(predicted - 40, predicted > 5, bins=10)
  np.testing.assert_array_equal(shifted.observed, result.observed)
  equal = statistics.calibration_bins(np.full(4, 0.3), np.array([0, 1, 1, 1]))
  np.testing.assert_allclose(equal, [[0.3], [0.75], [4]])
  assert statistics.calibration_bins(np.zeros(0), np.zeros(0)).counts.size == 0


def test_calibration_bins_keep_the_means():
  rng = np.random.default_rng(0)
  predicted = rng.random(500)
  observed = rng.random(500) < predicted
  result = statistics.calibration_bins(predicted, observed)
  assert result.counts.sum() == 500
  assert result.predicted @ result.counts / 500 == pytest.approx(
    predicted.mean()
  )
  assert result.observed @ result.counts / 500 == pytest.approx(observed.mean())


def test_paired_test_against_sums_of_binomials():
  first = np.array([1] * 9 + [0] * 2 + [1] * 30 + [0] * 59)
  second = np.array([0] * 9 + [1] * 2 + [1] * 30 + [0] * 59)
  result = statistics.paired_test(first, second)
  assert (result.only_first, result.only_second) == (9, 2)
  assert result.difference == pytest.approx(0.07)
  # P(X <= 2 or X >= 9) for X ~ Binomial(11, 1/2).
  tail = sum(math.comb(11, k) for k in range(3)) / 2**11
  assert result.p_value == pytest.approx(2 * tail)
  paired = first - second
  half = stats.norm.ppf(0.975) * paired.std() / math.sqrt(len(paired))
  assert result.interval == pytest.approx((0.07 - half, 0.07 + half))


def test_paired_test_of_equal_methods():
  grades = np.array([True, False, True])
  result = statistics.paired_test(grades, grades)
  assert result == (0.0, (0.0, 0.0), 0, 0, 1.0)


def test_spread_by_hand():
  result = statistics.spread(np.array([0.8, 0.9, 1.0]))
  assert result.mean == pytest.approx(0.9)
  assert result.std == pytest.approx(0.1)
  # t(0.975, 2 degrees) = 4.3027
  half = 4.3027 * 0.1 / math.sqrt(3)
  assert result.interval == pytest.approx((0.9 - half, 0.9 + half), abs=1e-4)
  one = statistics.spread(np.array([0.8]))
  assert one.mean == 0.8
  assert math.isnan(one.std)


@pytest.mark.parametrize(
  "call",
  [
    lambda: statistics.calibration_bins(np.ones(2), np.ones(3)),
    lambda: statistics.paired_test(np.ones(2), np.ones(3)),
    lambda: statistics.spread(np.array([])),
  ],
)
def test_bad_shapes_are_errors(call):
  with pytest.raises(ValueError, match="expected"):
    call()
