"""AUC of several scores on the same trajectories, with paired intervals."""

import numpy as np
import pytest

from oreo_jax import report
from oreo_jax.analysis.statistics import pooled_auc, within_problem_auc
from oreo_jax.stages.heldout import compare_scores, problem_bootstrap


def draw(count=60, seed=0, shift=1.0):
  """Four answers a problem; the score knows the label by `shift`."""
  rng = np.random.default_rng(seed)
  problems = [str(i // 4) for i in range(4 * count)]
  labels = rng.random(4 * count) < 0.4
  scores = rng.normal(size=4 * count).round(1) + shift * labels
  return scores, labels, problems


def test_figures_are_those_of_the_plain_statistics():
  scores, labels, problems = draw()
  found = problem_bootstrap(scores, labels, problems, resamples=200)
  assert found["pooled"].auc == pytest.approx(pooled_auc(scores, labels))
  plain = within_problem_auc(scores, labels, problems, resamples=200)
  assert found["within"].auc == pytest.approx(plain.auc)
  np.testing.assert_allclose(
    found["within"].interval(), plain.interval, atol=0.02
  )


def test_a_resample_is_the_auc_of_repeated_problems():
  scores, labels, problems = draw(count=5, seed=1)
  found = problem_bootstrap(scores, labels, problems, resamples=3, seed=7)
  rng = np.random.default_rng(7)
  names = sorted(set(problems))
  for sample in found["pooled"].samples:
    weights = dict(zip(names, rng.multinomial(5, np.full(5, 0.2)), strict=True))
    rows = [i for i, p in enumerate(problems) for _ in range(weights[p])]
    assert sample == pytest.approx(pooled_auc(scores[rows], labels[rows]))


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
  found = compare_scores(
    {"value": scores, "same": 2 * scores, "noise": noise},
    labels,
    problems,
    resamples=300,
  )
  first, same, other = found["scores"]
  assert first["pooled_lead"] == same["pooled_lead"] == 0.0
  assert same["within_lead_interval"] == [0.0, 0.0]
  assert other["within_lead"] > 0.1
  assert other["within_lead_interval"][0] > 0.0
  assert found["problems"] == 150
  assert found["right"] == labels.sum()


def test_one_class_gives_no_figure():
  scores, _, problems = draw(count=3)
  found = problem_bootstrap(scores, np.ones(12, bool), problems, resamples=5)
  assert np.isnan(found["pooled"].auc) and np.isnan(found["within"].auc)
  assert np.isnan(found["pooled"].interval()).all()


def test_table_and_headline_of_a_run_without_methods():
  scores, labels, problems = draw(count=20)
  results = {
    "task": "trajectories",
    "seed": 0,
    "problems": 20,
    "methods": [],
    "value_scores": compare_scores(
      {"value, last state": scores}, labels, problems, resamples=50
    ),
  }
  table = report.format_table(results)
  assert table.splitlines()[2].startswith("value, last state")
  assert "AUC within" in table and "trajectories are right" in table
  assert "20 held-out problems" in report.headline(results)
