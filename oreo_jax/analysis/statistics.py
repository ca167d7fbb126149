"""Intervals, paired tests and calibration for reported figures.

Everything here is NumPy and SciPy in float64 on the host. An accuracy comes
with a 95% interval, and two methods on the same problems are compared as pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats


class CalibrationBins(NamedTuple):
  """Mean prediction against mean outcome; empty bins are left out."""

  predicted: np.ndarray  # f64[n] mean prediction in the bin
  observed: np.ndarray  # f64[n] mean outcome in the bin
  counts: np.ndarray  # i64[n] examples in the bin


class PairedTest(NamedTuple):
  """Two methods on the same problems."""

  difference: float  # accuracy of the first less that of the second
  interval: tuple[float, float]  # of the difference, normal approximation
  only_first: int  # problems that only the first solves
  only_second: int  # problems that only the second solves
  p_value: float  # exact McNemar, two-sided


class Spread(NamedTuple):
  """A figure over several seeds."""

  mean: float
  std: float  # sample standard deviation (n - 1); nan for one seed
  interval: tuple[float, float]  # Student t of the mean; nan for one seed
  num_seeds: int


def wilson_interval(
  correct: int, total: int, *, confidence: float = 0.95
) -> tuple[float, float]:
  """Wilson score interval of a success rate.

  Args:
    correct: successes, 0 <= correct <= total.
    total: trials, at least 1.
    confidence: coverage in (0, 1).

  Returns:
    (low, high), inside [0, 1] and sensible at 0 and at 100% too.

  Raises:
    ValueError: For a count outside its range.

  >>> low, high = wilson_interval(8, 10)
  >>> round(low, 3), round(high, 3)
  (0.49, 0.943)

  Source: Wilson, JASA 22 (1927).
  """
  if not 0 <= correct <= total or total < 1:
    raise ValueError(
      f"expected 0 <= correct <= total and total >= 1, got correct={correct}, "
      f"total={total}"
    )
  interval = stats.binomtest(int(correct), int(total)).proportion_ci(
    confidence_level=confidence, method="wilson"
  )
  return float(interval.low), float(interval.high)


def calibration_bins(
  predicted: np.ndarray, observed: np.ndarray, *, bins: int = 10
) -> CalibrationBins:
  """Mean outcome against mean prediction in bins of equal width.

  The bins divide the range of the predictions, wherever it lies: a value is a
  regression target, which need not stay inside that of the rewards.

  Args:
    predicted: f[n] predictions.
    observed: f[n] (or bool) outcomes or success rates.
    bins: number of bins, at least 1.

  Returns:
    `CalibrationBins` of the bins that are not empty; one bin when all
    predictions are equal.

  Raises:
    ValueError: If the shapes differ or `bins` is below 1.
  """
  predicted = np.asarray(predicted, np.float64)
  observed = np.asarray(observed, np.float64)
  if predicted.shape != observed.shape or predicted.ndim != 1 or bins < 1:
    raise ValueError(
      "expected predicted and observed of one shape [n] and bins >= 1, got "
      f"{predicted.shape}, {observed.shape} and bins={bins}"
    )
  if not predicted.size:
    return CalibrationBins(predicted, observed, np.zeros(0, np.int64))
  edges = np.linspace(predicted.min(), predicted.max(), bins + 1)
  # Inner edges alone: the largest prediction belongs to the last bin.
  index = np.searchsorted(edges[1:-1], predicted, side="right")
  count = np.bincount(index, minlength=bins)
  filled = count > 0
  mean_predicted = np.bincount(index, predicted, bins)[filled] / count[filled]
  mean_observed = np.bincount(index, observed, bins)[filled] / count[filled]
  return CalibrationBins(mean_predicted, mean_observed, count[filled])


def paired_test(
  first: np.ndarray, second: np.ndarray, *, confidence: float = 0.95
) -> PairedTest:
  """Compares two methods graded on the same problems.

  With b problems that only the first solves and c that only the second solves,
  b is Binomial(b + c, 1/2) if the methods are equally good (exact McNemar).

  Args:
    first: bool[n] (or 0/1), one grade a problem.
    second: bool[n], the same problems in the same order.
    confidence: coverage of the interval of the difference.

  Returns:
    `PairedTest`; the p-value is 1 when the methods solve the same problems.

  Raises:
    ValueError: If the shapes differ or are empty.
  """
  first = check_grades(first, "first")
  second = check_grades(second, "second")
  if first.shape != second.shape or not first.size:
    raise ValueError(
      "expected two grade arrays over the same problems, got shapes "
      f"{first.shape} and {second.shape}"
    )
  only_first = int((first & ~second).sum())
  only_second = int((second & ~first).sum())
  discordant = only_first + only_second
  p_value = (
    float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
  )
  difference = (only_first - only_second) / first.size
  # Variance of the mean of the per-problem differences in {-1, 0, 1}.
  variance = (discordant / first.size - difference**2) / first.size
  half = float(stats.norm.ppf((1 + confidence) / 2)) * variance**0.5
  interval = (max(difference - half, -1.0), min(difference + half, 1.0))
  return PairedTest(difference, interval, only_first, only_second, p_value)


def spread(samples: np.ndarray, *, confidence: float = 0.95) -> Spread:
  """Mean, standard deviation and t-interval of a figure over seeds.

  Args:
    samples: f[n], one figure a seed, n >= 1.
    confidence: coverage of the interval of the mean.

  Returns:
    `Spread`; the deviation and the interval are nan for one seed.

  Raises:
    ValueError: If there are no samples.
  """
  samples = np.asarray(samples, np.float64)
  if samples.ndim != 1 or not samples.size:
    raise ValueError(f"expected samples of shape [n >= 1], got {samples.shape}")
  mean = float(samples.mean())
  nan = float("nan")
  if samples.size == 1:
    return Spread(mean, nan, (nan, nan), 1)
  std = float(samples.std(ddof=1))
  quantile = float(stats.t.ppf((1 + confidence) / 2, samples.size - 1))
  half = quantile * std / samples.size**0.5
  return Spread(mean, std, (mean - half, mean + half), samples.size)


def check_grades(labels: np.ndarray, name: str) -> np.ndarray:
  """Returns bool[n] of grades that are 0 or 1; `name` stands in the error."""
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
    raise ValueError(
      f"{name}: expected 0 or 1 an answer in an array [n], got shape "
      f"{labels.shape} with values such as {labels.ravel()[:3].tolist()}"
    )
  return labels.astype(bool)
