"""Differences of methods over seeds and problems."""

import doctest
import json
import math

import numpy as np
import pytest
from scipy import stats

from oreo_jax.analysis import comparison
from oreo_jax.analysis.comparison import contrast, contrasts, summarise


def test_doctests():
  result = doctest.testmod(comparison, raise_on_error=False)
  assert result.attempted >= 1
  assert result.failed == 0


def measured(*rewards):
  return [
    {"accuracy": float(np.mean(r)), "rewards": list(r), "seconds": 4.0}
    for r in rewards
  ]


def test_a_row_of_the_table_by_hand():
  # Two seeds, four problems.
  sft = measured([1, 0, 0, 0], [1, 1, 0, 0])
  ours = measured([1, 1, 1, 0], [1, 1, 1, 1])
  row = summarise("dpo", ours, sft, 1e-3)
  assert row["mean"] == pytest.approx(0.875)
  assert row["std"] == pytest.approx(np.std([0.75, 1.0], ddof=1))
  against = row["against_sft"]
  assert against["difference"] == pytest.approx(0.5)
  # Two problems turned right in each seed and none wrong: 2 * (1/2)^2.
  assert against["p_values"] == [0.5, 0.5]
  assert against["only_method"] == [2, 2] and against["only_sft"] == [0, 0]
  # Per problem the seeds gain 0, 1/2, 1 and 1/2; both seeds gain 1/2, so that
  # the problems are all that varies: t(0.975, 3 degrees) = 3.1824.
  half = 3.1824 * math.sqrt(1 / 6 / 4)
  low, high = against["interval"]
  assert low == pytest.approx(0.5 - half, abs=1e-4)
  assert high == 1.0  # 1.15 is cut
  assert against["seeds"] == 2
  json.dumps(row, allow_nan=False)


def test_seeds_of_one_problem_are_not_counted_twice():
  rng = np.random.default_rng(0)
  sft, ours = (list(rng.integers(0, 2, 200)) for _ in range(2))
  once = summarise("dpo", measured(ours), measured(sft), None)
  thrice = summarise(
    "dpo", measured(ours, ours, ours), measured(sft, sft, sft), None
  )
  assert thrice["against_sft"]["interval"] == pytest.approx(
    once["against_sft"]["interval"]
  )


def test_a_method_that_changes_nothing():
  sft = measured([1, 0, 1], [0, 0, 1])
  against = summarise("kto", sft, sft, 1e-3)["against_sft"]
  assert against["difference"] == 0 and against["p_values"] == [1.0, 1.0]
  assert against["interval"] == [0.0, 0.0]


def draw(rng, ease, gains):
  """Grades of two methods; the second one's seeds gain `gains` in log-odds."""
  shape = (len(gains), len(ease))
  chances = 1 / (1 + np.exp(-(ease + gains[:, None])))
  first = rng.random(shape) < chances
  second = rng.random(shape) < 1 / (1 + np.exp(-ease))
  return first, second


def interval_of_problems(first, second, rng):
  """What was printed before: the seeds are taken as given."""
  gains = (first.astype(float) - second).mean(axis=0)
  even = np.full(len(gains), 1 / len(gains))
  draws = rng.multinomial(len(gains), even, size=300)
  return np.quantile(draws @ gains / len(gains), [0.025, 0.975])


def test_interval_covers_the_mean_over_seeds_and_problems():
  # Three seeds whose gain varies by 0.6 in log-odds, some 10 points: another
  # three seeds would have trained other policies.
  rng = np.random.default_rng(0)
  ease = rng.normal(0, 1.5, 200_000)
  gains = rng.normal(0.8, 0.6, ease.size)
  truth = np.mean(1 / (1 + np.exp(-ease - gains)) - 1 / (1 + np.exp(-ease)))
  trials, covered, covered_before = 200, 0, 0
  for _ in range(trials):
    pair = draw(rng, rng.normal(0, 1.5, 400), rng.normal(0.8, 0.6, 3))
    low, high = contrast(*pair).interval
    covered += low <= truth <= high
    low, high = interval_of_problems(*pair, rng)
    covered_before += low <= truth <= high
  assert 0.91 <= covered / trials <= 0.99
  assert covered_before / trials < 0.6


def test_equal_methods_are_told_apart_as_rarely_as_the_level_says():
  rng = np.random.default_rng(1)
  rejected = 0
  for _ in range(200):
    ease = rng.normal(0, 1.5, 300)
    gains = rng.normal(0, 0.5, (2, 3))
    first, _ = draw(rng, ease, gains[0])
    second, _ = draw(rng, ease, gains[1])
    rejected += contrast(first, second).p_value < 0.05
  assert rejected / 200 <= 0.09  # McNemar, the largest of the seeds: 0.17


def test_the_seeds_of_the_arithmetic_comparison():
  # OREO and SFT solved these numbers of 1,000 problems under three seeds. The
  # page said that OREO gains 14.9 to 19.1 points. Student's t over the three
  # gains alone says 6.1 to 27.9.
  rng = np.random.default_rng(5)
  ours, theirs = np.zeros((2, 3, 1000), int)
  for row, solved in zip(ours, (367, 242, 358), strict=True):
    row[rng.choice(1000, solved, replace=False)] = 1
  for row, solved in zip(theirs, (168, 122, 166), strict=True):
    row[rng.choice(1000, solved, replace=False)] = 1
  result = contrast(ours, theirs)
  assert result.difference == pytest.approx(0.17, abs=1e-3)
  assert result.interval == pytest.approx((0.08, 0.26), abs=0.005)
  assert 0.01 < result.p_value < 0.05


def test_one_source_of_chance_is_the_test_everyone_knows():
  # All problems gain alike: Student's t over the seeds.
  first = np.repeat([[1], [0], [1], [1]], 50, axis=1)
  second = np.repeat([[0], [0], [1], [0]], 50, axis=1)
  result = contrast(first, second)
  want = stats.ttest_rel(first[:, 0], second[:, 0])
  assert result.p_value == pytest.approx(want.pvalue)
  low, high = want.confidence_interval(0.95)
  assert high > 1  # a difference of accuracies is at most 1
  assert result.interval == pytest.approx((low, 1.0))
  # All seeds gain alike: Student's t over the problems.
  rng = np.random.default_rng(2)
  first, second = rng.integers(0, 2, (2, 1, 60))
  thrice = contrast(np.repeat(first, 3, axis=0), np.repeat(second, 3, axis=0))
  want = stats.ttest_rel(first[0], second[0])
  assert thrice.p_value == pytest.approx(want.pvalue)
  assert thrice.interval == pytest.approx(tuple(want.confidence_interval(0.95)))


def test_order_does_not_matter_and_sides_change_the_sign():
  rng = np.random.default_rng(3)
  first, second = rng.integers(0, 2, (2, 3, 40))
  result = contrast(first, second)
  seeds, problems = rng.permutation(3), rng.permutation(40)
  moved = contrast(first[seeds][:, problems], second[seeds][:, problems])
  assert moved.interval == pytest.approx(result.interval)
  assert moved.p_value == pytest.approx(result.p_value)
  swapped = contrast(second, first)
  assert swapped.difference == pytest.approx(-result.difference)
  assert swapped.interval == pytest.approx(
    (-result.interval[1], -result.interval[0])
  )


def test_one_seed_is_tested_over_problems_alone():
  first = np.array([[1] * 9 + [0] * 2 + [1] * 30 + [0] * 59])
  second = np.array([[0] * 9 + [1] * 2 + [1] * 30 + [0] * 59])
  result = contrast(first, second)
  assert result.seeds == 1
  # P(X <= 2 or X >= 9) for X ~ Binomial(11, 1/2).
  tail = sum(math.comb(11, k) for k in range(3)) / 2**11
  assert result.p_value == pytest.approx(2 * tail)


def test_every_method_is_tested_against_those_before_it():
  rng = np.random.default_rng(4)
  runs = {
    name: measured(*(rng.random((2, 100)) < chance).astype(int))
    for name, chance in (("sft", 0.3), ("dpo", 0.35), ("oreo", 0.7))
  }
  rows = contrasts(runs)
  assert [(row["method"], row["other"]) for row in rows] == [
    ("dpo", "sft"),
    ("oreo", "sft"),
    ("oreo", "dpo"),
  ]
  row = summarise("oreo", runs["oreo"], runs["sft"], 1e-3)
  assert row["against_sft"]["interval"] == rows[1]["interval"]
  assert all(row["p_holm"] >= row["p_value"] for row in rows)
  assert min(row["p_holm"] for row in rows) == pytest.approx(
    3 * min(row["p_value"] for row in rows)
  )
  json.dumps(rows, allow_nan=False)


def test_shapes_that_do_not_fit_are_an_error():
  for first, second in (
    (np.ones((2, 3)), np.ones((2, 4))),
    (np.ones(3), np.ones(3)),
    (np.ones((2, 0)), np.ones((2, 0))),
    (np.full((1, 2), 0.5), np.ones((1, 2))),
  ):
    with pytest.raises(ValueError, match="expected"):
      contrast(first, second)
