"""AUC of scores against counts of pairs, and its bootstrap over problems."""

import doctest
import math

import numpy as np
import pytest

from oreo_jax.analysis import auc
from oreo_jax.analysis.auc import compare_scores, problem_bootstrap
from oreo_jax.analysis.values import analyse


def brute_auc(scores, labels):
  wins = pairs = 0.0
  for right, is_right in zip(scores, labels, strict=True):
    for wrong, other in zip(scores, labels, strict=True):
      if is_right and not other:
        pairs += 1
        wins += 1.0 if right > wrong else 0.5 if right == wrong else 0.0
  return wins / pairs if pairs else math.nan


def draw(count=60, seed=0, shift=1.0):
  """Four answers a problem; the score knows the label by `shift`."""
  rng = np.random.default_rng(seed)
  problems = [str(i // 4) for i in range(4 * count)]
  labels = rng.random(4 * count) < 0.4
  scores = rng.normal(size=4 * count).round(1) + shift * labels
  return scores, labels, problems


def test_doctests():
  result = doctest.testmod(auc, extraglobs={"np": np}, raise_on_error=False)
  assert result.attempted >= 1
  assert result.failed == 0


@pytest.mark.parametrize("seed", range(5))
def test_pooled_auc_is_the_pair_count(seed):
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 6, 40) / 5  # many ties
  labels = rng.random(40) < 0.4
  assert auc.pooled_auc(scores, labels) == pytest.approx(
    brute_auc(scores, labels), abs=1e-12
  )
  # A strictly rising map keeps it; a falling one mirrors it.
  assert auc.pooled_auc(np.exp(scores), labels) == pytest.approx(
    auc.pooled_auc(scores, labels)
  )
  assert auc.pooled_auc(-scores, labels) == pytest.approx(
    1 - auc.pooled_auc(scores, labels)
  )


def test_pooled_auc_of_one_class_is_nan():
  assert math.isnan(auc.pooled_auc(np.ones(3), np.ones(3)))
  assert math.isnan(auc.pooled_auc(np.ones(3), np.zeros(3)))


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
    own = brute_auc(scores[mine], labels[mine])
    if not math.isnan(own):
      aucs.append(own)
      pairs += int(labels[mine].sum() * (~labels[mine]).sum())
  names = np.array([f"p{problem}" for problem in problems])
  result = auc.within_problem_auc(scores, labels, names)
  assert result.auc == pytest.approx(np.mean(aucs), abs=1e-12)
  assert (result.problems, result.pairs) == (len(aucs), pairs)
  assert result.interval[0] < result.auc < result.interval[1]

  # The order of the answers does not matter, the interval included.
  order = rng.permutation(90)
  again = auc.within_problem_auc(scores[order], labels[order], names[order])
  assert again == result


def test_within_problem_auc_ignores_which_problems_are_easy():
  # A critic that knows the problem but nothing about the answers: pooled it
  # looks good, within problems it is a coin.
  rng = np.random.default_rng(0)
  problems = np.repeat(np.arange(200), 8)
  ease = np.repeat(rng.random(200), 8)
  labels = rng.random(1600) < ease
  assert auc.pooled_auc(ease, labels) > 0.8
  assert auc.within_problem_auc(ease, labels, problems).auc == 0.5


def test_problems_weigh_the_same_whatever_their_pairs():
  problems = np.array([0] * 2 + [1] * 20)
  labels = np.array([1, 0] + [1] * 10 + [0] * 10)
  scores = np.where(problems == 0, labels, 1 - labels).astype(float)
  assert auc.within_problem_auc(scores, labels, problems).auc == 0.5


def test_within_problem_auc_without_a_mixed_problem_is_nan():
  for n in (0, 4):
    result = auc.within_problem_auc(np.zeros(n), np.zeros(n), np.arange(n))
    assert math.isnan(result.auc)
    assert (result.problems, result.pairs) == (0, 0)


def test_figures_are_those_of_the_two_algorithms_there_were():
  # What `problem_bootstrap` of the stages printed.
  scores, labels, problems = draw()
  resampled = problem_bootstrap(scores, labels, problems, resamples=500, seed=4)
  pooled, within = resampled["pooled"], resampled["within"]
  assert pooled.auc == pytest.approx(0.7245922681969194)
  assert pooled.interval() == pytest.approx(
    (0.669703715830494, 0.778394675893773)
  )
  assert within.auc == pytest.approx(0.7562893081761005)
  assert within.interval() == pytest.approx(
    (0.685140931372549, 0.8293669871794871)
  )
  # What `within_problem_auc` printed, where every problem has both classes.
  labels[0::4], labels[1::4] = True, False
  result = auc.within_problem_auc(
    scores, labels, problems, resamples=500, seed=4
  )
  assert result.auc == pytest.approx(0.6548611111111112)
  assert result.interval == pytest.approx(
    (0.5756944444444444, 0.7364756944444444)
  )
  assert (result.problems, result.pairs) == (60, 209)


def test_one_auc_has_one_interval():
  # The table of scores and the curve along the answers both show the AUC of
  # the last state. With problems of one class the old two algorithms gave
  # 0.685 to 0.829 and 0.678 to 0.824.
  scores, labels, problems = draw()
  along = scores.astype(np.float32)[:, None]
  rows = compare_scores({"value": along[:, 0]}, labels, problems, seed=4)
  curve = analyse(
    along, np.zeros(len(labels), int), labels.astype(float), problems, seed=4
  )
  row = rows["scores"][0]
  assert row["within_auc"] == curve["within_problem_auc"][-1]
  assert row["within_interval"] == curve["within_problem_auc_interval"][-1]
  assert row["pooled_auc"] == curve["pooled_auc"][-1]


def test_a_resample_is_the_auc_of_repeated_problems():
  scores, labels, problems = draw(count=5, seed=1)
  resampled = problem_bootstrap(scores, labels, problems, resamples=3, seed=7)
  rng = np.random.default_rng(7)
  names = sorted(set(problems))
  for sample in resampled["pooled"].samples:
    weights = dict(zip(names, rng.multinomial(5, np.full(5, 0.2)), strict=True))
    rows = [i for i, p in enumerate(problems) for _ in range(weights[p])]
    assert sample == pytest.approx(auc.pooled_auc(scores[rows], labels[rows]))


def test_interval_covers_the_truth_when_answers_of_a_problem_agree():
  # Labels and scores of a problem are all equal: 40 answers, but 10 facts. An
  # interval over answers would be half as wide and miss far too often.
  rng = np.random.default_rng(3)
  covered = 0
  for seed in range(60):
    labels = np.repeat(rng.random(10) < 0.5, 4)
    scores = np.repeat(rng.normal(size=10), 4)
    if labels.all() or not labels.any():
      covered += 1
      continue
    problems = [str(i // 4) for i in range(40)]
    low, high = problem_bootstrap(
      scores, labels, problems, resamples=200, seed=seed
    )["pooled"].interval()
    covered += low <= 0.5 <= high
  assert covered >= 48


def test_lead_of_the_first_score_is_paired():
  scores, labels, problems = draw(count=150)
  noise = np.random.default_rng(5).normal(size=len(scores))
  compared = compare_scores(
    {"value": scores, "same": 2 * scores, "noise": noise},
    labels,
    problems,
    resamples=300,
  )
  first, same, other = compared["scores"]
  assert first["pooled_lead"] == same["pooled_lead"] == 0.0
  assert same["within_lead_interval"] == [0.0, 0.0]
  assert other["within_lead"] > 0.1
  assert other["within_lead_interval"][0] > 0.0
  assert compared["problems"] == 150
  assert compared["right"] == labels.sum()


def test_one_class_gives_no_figure():
  scores, _, problems = draw(count=3)
  resampled = problem_bootstrap(
    scores, np.ones(12, bool), problems, resamples=5
  )
  assert np.isnan(resampled["pooled"].auc) and np.isnan(resampled["within"].auc)
  assert np.isnan(resampled["pooled"].interval()).all()


@pytest.mark.parametrize(
  "call",
  [
    lambda: auc.pooled_auc(np.ones(3), np.ones(2)),
    lambda: auc.pooled_auc(np.ones(2), np.array([0.5, 1])),
    lambda: auc.pooled_auc(np.array([np.nan, 1]), np.array([0, 1])),
    lambda: auc.within_problem_auc(np.ones(2), np.array([0, 1]), np.ones(3)),
  ],
)
def test_bad_shapes_are_errors(call):
  with pytest.raises(ValueError, match="expected"):
    call()
