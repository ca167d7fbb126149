import doctest
import math

import numpy as np
import pytest
from scipy import stats

from oreo_jax.analysis import statistics


def brute_auc(scores, labels):
  wins = pairs = 0.0
  for right, is_right in zip(scores, labels, strict=True):
    for wrong, other in zip(scores, labels, strict=True):
      if is_right and not other:
        pairs += 1
        wins += 1.0 if right > wrong else 0.5 if right == wrong else 0.0
  return wins / pairs if pairs else math.nan


def test_doctests():
  result = doctest.testmod(
    statistics, extraglobs={"np": np}, raise_on_error=False
  )
  assert result.attempted >= 3
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


@pytest.mark.parametrize("seed", range(5))
def test_pooled_auc_is_the_pair_count(seed):
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 6, 40) / 5  # many ties
  labels = rng.random(40) < 0.4
  assert statistics.pooled_auc(scores, labels) == pytest.approx(
    brute_auc(scores, labels), abs=1e-12
  )
  # A strictly rising map keeps it; a falling one mirrors it.
  assert statistics.pooled_auc(np.exp(scores), labels) == pytest.approx(
    statistics.pooled_auc(scores, labels)
  )
  assert statistics.pooled_auc(-scores, labels) == pytest.approx(
    1 - statistics.pooled_auc(scores, labels)
  )


def test_pooled_auc_of_one_class_is_nan():
  assert math.isnan(statistics.pooled_auc(np.ones(3), np.ones(3)))
  assert math.isnan(statistics.pooled_auc(np.ones(3), np.zeros(3)))


@pytest.mark.parametrize("seed", range(5))
def test_within_problem_auc_is_the_mean_over_problems(seed):
  rng = np.random.default_rng(seed)
  problems = rng.integers(0, 12, 90)
  scores = np.round(rng.normal(size=90), 1)
  labels = rng.random(90) < 0.3
  aucs = []
  pairs = 0
  for problem in range(12):
    mine = problems == problem
    auc = brute_auc(scores[mine], labels[mine])
    if not math.isnan(auc):
      aucs.append(auc)
      pairs += int(labels[mine].sum() * (~labels[mine]).sum())
  names = np.array([f"p{problem}" for problem in problems])
  result = statistics.within_problem_auc(scores, labels, names)
  assert result.auc == pytest.approx(np.mean(aucs), abs=1e-12)
  assert (result.problems, result.pairs) == (len(aucs), pairs)
  assert result.interval[0] < result.auc < result.interval[1]

  # The order of the answers does not matter, the interval included.
  order = rng.permutation(90)
  again = statistics.within_problem_auc(
    scores[order], labels[order], names[order]
  )
  assert again == result


def test_within_problem_auc_ignores_which_problems_are_easy():
  # A critic that knows the problem but nothing about the answers: pooled it
  # looks good, within problems it is a coin.
  rng = np.random.default_rng(0)
  problems = np.repeat(np.arange(200), 8)
  ease = np.repeat(rng.random(200), 8)
  labels = rng.random(1600) < ease
  assert statistics.pooled_auc(ease, labels) > 0.8
  assert statistics.within_problem_auc(ease, labels, problems).auc == 0.5


def test_problems_weigh_the_same_whatever_their_pairs():
  problems = np.array([0] * 2 + [1] * 20)
  labels = np.array([1, 0] + [1] * 10 + [0] * 10)
  scores = np.where(problems == 0, labels, 1 - labels).astype(float)
  assert statistics.within_problem_auc(scores, labels, problems).auc == 0.5


def test_within_problem_auc_without_a_mixed_problem_is_nan():
  for n in (0, 4):
    result = statistics.within_problem_auc(
      np.zeros(n), np.zeros(n), np.arange(n)
    )
    assert math.isnan(result.auc)
    assert (result.problems, result.pairs) == (0, 0)


def test_bootstrap_covers_and_is_seeded():
  rng = np.random.default_rng(0)
  hits = sum(
    low <= 0.3 <= high
    for trial in range(200)
    for low, high in [
      statistics.bootstrap_interval(
        (rng.random(80) < 0.3).astype(float), resamples=300, seed=trial
      )
    ]
  )
  assert 0.90 <= hits / 200 <= 0.99
  samples = rng.random(30)
  assert statistics.bootstrap_interval(samples, seed=1) == (
    statistics.bootstrap_interval(samples, seed=1)
  )
  assert statistics.bootstrap_interval(samples, seed=1) != (
    statistics.bootstrap_interval(samples, seed=2)
  )
  # The width is that of the standard error.
  low, high = statistics.bootstrap_interval(samples, resamples=4000)
  half = 1.96 * samples.std() / math.sqrt(30)
  assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_calibration_bins_by_hand():
  result = statistics.calibration_bins(
    np.array([-0.2, 0.1, 0.3, 0.95, 1.0, 1.4]),
    np.array([0, 1, 0, 1, 1, 0]),
    bins=4,
  )
  np.testing.assert_allclose(result.predicted, [-0.05, 0.3, 3.35 / 3])
  np.testing.assert_allclose(result.observed, [0.5, 0.0, 2 / 3])
  np.testing.assert_array_equal(result.count, [2, 1, 3])


def test_calibration_bins_keep_the_means():
  rng = np.random.default_rng(0)
  predicted = rng.random(500)
  observed = rng.random(500) < predicted
  result = statistics.calibration_bins(predicted, observed)
  assert result.count.sum() == 500
  assert result.predicted @ result.count / 500 == pytest.approx(
    predicted.mean()
  )
  assert result.observed @ result.count / 500 == pytest.approx(observed.mean())


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
    lambda: statistics.pooled_auc(np.ones(3), np.ones(2)),
    lambda: statistics.pooled_auc(np.ones(2), np.array([0.5, 1])),
    lambda: statistics.pooled_auc(np.array([np.nan, 1]), np.array([0, 1])),
    lambda: statistics.within_problem_auc(
      np.ones(2), np.array([0, 1]), np.ones(3)
    ),
    lambda: statistics.calibration_bins(np.ones(2), np.ones(3)),
    lambda: statistics.paired_test(np.ones(2), np.ones(3)),
    lambda: statistics.spread(np.array([])),
    lambda: statistics.bootstrap_interval(np.array([])),
  ],
)
def test_bad_shapes_are_errors(call):
  with pytest.raises(ValueError, match="expected"):
    call()
