"""How well a score ranks right answers above wrong ones, with intervals.

The AUC is the probability that a right answer scores above a wrong one, ties
counting half. Pooled over all answers it mostly measures which problems are
easy; within problems it compares answers to the same problem alone. Every AUC
and every interval of the package comes from this module, so that one figure
has one interval wherever it is printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from oreo_jax.analysis.statistics import check_grades

RESAMPLES = 2000


class ProblemAuc(NamedTuple):
  """Within-problem ranking quality of a critic."""

  auc: float  # mean over problems; nan when no problem has both classes
  interval: tuple[float, float]  # percentile bootstrap over problems
  problems: int  # problems with both classes: the ones that count
  pairs: int  # (right, wrong) pairs in those problems


class ResampledAuc(NamedTuple):
  """AUC of one score, and its values on resampled problems."""

  auc: float
  samples: np.ndarray  # f64[resamples]; nan where a class was missing

  def interval(self, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the percentile interval."""
    return _percentile_interval(self.samples, confidence)


def pooled_auc(scores: np.ndarray, labels: np.ndarray) -> float:
  """Probability that a right answer scores above a wrong one, ties 1/2.

  Args:
    scores: f[n].
    labels: bool[n] (or 0/1): right or wrong.

  Returns:
    The area under the ROC curve; nan when one class is empty.

  >>> pooled_auc(np.array([0.1, 0.9, 0.9]), np.array([0, 1, 0]))
  0.75
  """
  scores, labels = _scores_and_labels(scores, labels)
  return _weighted_auc(_ranks(scores), labels, np.ones(len(labels)))


def within_problem_auc(
  scores: np.ndarray,
  labels: np.ndarray,
  problems: Sequence[Any] | np.ndarray,
  *,
  confidence: float = 0.95,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> ProblemAuc:
  """AUC of right against wrong answers to the same problem.

  The AUC of every problem that has both a right and a wrong answer, averaged
  with equal weight a problem (not a pair, which would favour the problems of
  middling difficulty). Problems with one class say nothing and are left out.
  The interval resamples problems, since answers to one problem are dependent:
  all problems, so that how many of them have both classes varies too.

  Args:
    scores: f[n], one score an answer.
    labels: bool[n] (or 0/1): right or wrong.
    problems: [n], any sortable identifier; equal means the same problem.
    confidence: coverage of the interval in (0, 1).
    resamples: bootstrap samples.
    seed: of the bootstrap.

  Returns:
    `ProblemAuc`, all nan with zero counts when no problem has both classes.

  Raises:
    ValueError: If the shapes differ or a score is not finite.
  """
  scores, labels = _scores_and_labels(scores, labels)
  members = _members(problems, len(scores))
  by_problem = _auc_by_problem(_ranks(scores), labels, members)
  draws = _problem_draws(len(members), resamples, seed)
  interval = _percentile_interval(_within(by_problem, draws), confidence)
  pairs = sum(int(labels[i].sum() * (~labels[i]).sum()) for i in members)
  mixed = int(np.isfinite(by_problem).sum())
  return ProblemAuc(_mean_within(by_problem), interval, mixed, pairs)


def problem_bootstrap(
  scores: np.ndarray,
  labels: np.ndarray,
  problems: Sequence[Any] | np.ndarray,
  *,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> dict[str, ResampledAuc]:
  """AUC pooled over all answers and within problems, resampling problems.

  A resample gives every problem a weight, the number of times it was drawn.
  Pooled, an answer counts as often as its problem; within, the mean over the
  problems that have a right and a wrong answer is weighted.

  Args:
    scores: f[n], one score an answer.
    labels: bool[n] (or 0/1): right or wrong.
    problems: [n], any sortable identifier; equal means the same problem.
    resamples: bootstrap samples.
    seed: of the bootstrap. Two scores of the same answers with one seed are
      resampled alike, so that their differences are paired.

  Returns:
    {"pooled": ..., "within": ...}.
  """
  scores, labels = _scores_and_labels(scores, labels)
  members = _members(problems, len(scores))
  ranks = _ranks(scores)
  by_problem = _auc_by_problem(ranks, labels, members)
  draws = _problem_draws(len(members), resamples, seed)
  problem_of = np.empty(len(scores), np.int64)
  for problem, answers in enumerate(members):
    problem_of[answers] = problem
  pooled = [_weighted_auc(ranks, labels, draw[problem_of]) for draw in draws]
  everything = np.ones(len(scores))
  return {
    "pooled": ResampledAuc(
      _weighted_auc(ranks, labels, everything), np.array(pooled)
    ),
    "within": ResampledAuc(
      _mean_within(by_problem), _within(by_problem, draws)
    ),
  }


def compare_scores(
  scores: Mapping[str, np.ndarray],
  labels: np.ndarray,
  problems: Sequence[str],
  *,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> dict[str, Any]:
  """Returns the AUC of every score, and by how much the first is better.

  Args:
    scores: f[n] each, higher for what is likely right; the first is compared
      with the others.
    labels: bool[n].
    problems: [n]; the bootstrap draws problems with all their answers, the same
      ones for every score, so that differences are paired.
    resamples: of the bootstrap.
    seed: of the bootstrap.

  Returns:
    What stands under `value_scores` in results.json.
  """
  bootstraps = {
    name: problem_bootstrap(
      score, labels, problems, resamples=resamples, seed=seed
    )
    for name, score in scores.items()
  }
  first = next(iter(bootstraps.values()))
  rows = []
  for name, bootstrap in bootstraps.items():
    row: dict[str, Any] = {"name": name}
    for kind, resampled in bootstrap.items():
      lead = ResampledAuc(
        first[kind].auc - resampled.auc,
        first[kind].samples - resampled.samples,
      )
      row[f"{kind}_auc"] = resampled.auc
      row[f"{kind}_interval"] = list(resampled.interval())
      row[f"{kind}_lead"] = lead.auc
      row[f"{kind}_lead_interval"] = list(lead.interval())
    rows.append(row)
  mixed = {p for p, right in zip(problems, labels, strict=True) if right}
  mixed &= {p for p, right in zip(problems, labels, strict=True) if not right}
  return {
    "trajectories": len(labels),
    "right": int(np.sum(labels)),
    "problems": len(set(problems)),
    "mixed_problems": len(mixed),
    "scores": rows,
  }


def _members(
  problems: Sequence[Any] | np.ndarray, answers: int
) -> list[np.ndarray]:
  """Returns the indices of the answers to each problem, problems sorted."""
  problems = np.asarray(problems)
  if problems.shape != (answers,):
    raise ValueError(
      f"problems has shape {problems.shape}, scores has {(answers,)}: "
      "expected one problem an answer"
    )
  if not answers:
    return []
  _, group = np.unique(problems, return_inverse=True)
  order = np.argsort(group, kind="stable")
  return np.split(order, np.cumsum(np.bincount(group))[:-1])


def _ranks(scores: np.ndarray) -> np.ndarray:
  """Returns i64[n]: 0 for the lowest score; equal scores have one rank."""
  return np.unique(scores, return_inverse=True)[1]


def _weighted_auc(
  ranks: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> float:
  """Returns the AUC of answers that count `weights` times; nan for one class.

  A right answer of rank r wins against all wrong answers below r and half of
  those at r.
  """
  right = np.bincount(ranks, weights * labels)
  wrong = np.bincount(ranks, weights * ~labels)
  pairs = right.sum() * wrong.sum()
  if not pairs:
    return float("nan")
  below = np.cumsum(wrong) - wrong
  return float(right @ (below + wrong / 2) / pairs)


def _auc_by_problem(
  ranks: np.ndarray, labels: np.ndarray, members: list[np.ndarray]
) -> np.ndarray:
  """Returns f64[problems]: nan for a problem of one class."""
  # Ranks are made small again, as `_weighted_auc` counts up to the largest.
  aucs = [
    _weighted_auc(_ranks(ranks[i]), labels[i], np.ones(len(i))) for i in members
  ]
  return np.array(aucs, np.float64)


def _problem_draws(problems: int, resamples: int, seed: int) -> np.ndarray:
  """Returns i64[resamples, problems]: how often each problem was drawn."""
  if not problems:
    return np.zeros((resamples, 0), np.int64)
  rng = np.random.default_rng(seed)
  even = np.full(problems, 1 / problems)
  return rng.multinomial(problems, even, size=resamples)


def _mean_within(by_problem: np.ndarray) -> float:
  finite = by_problem[np.isfinite(by_problem)]
  return float(finite.mean()) if finite.size else float("nan")


def _within(by_problem: np.ndarray, draws: np.ndarray) -> np.ndarray:
  """Returns f64[resamples]: the mean over the mixed problems that were drawn.

  nan for a resample that drew none of them.
  """
  mixed = np.isfinite(by_problem)
  weights = draws[:, mixed].astype(np.float64)
  total = weights.sum(axis=1)
  mean = np.full(len(draws), np.nan)
  np.divide(weights @ by_problem[mixed], total, out=mean, where=total > 0)
  return mean


def _percentile_interval(
  samples: np.ndarray, confidence: float
) -> tuple[float, float]:
  finite = samples[np.isfinite(samples)]
  if not finite.size:
    return float("nan"), float("nan")
  tail = (1 - confidence) / 2
  low, high = np.quantile(finite, [tail, 1 - tail])
  return float(low), float(high)


def _scores_and_labels(
  scores: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  scores = np.asarray(scores, np.float64)
  labels = check_grades(labels, "labels")
  if scores.shape != labels.shape:
    raise ValueError(
      f"scores has shape {scores.shape}, labels has {labels.shape}: expected "
      "one label a score"
    )
  if not np.isfinite(scores).all():
    raise ValueError("scores: expected finite numbers, got nan or infinity")
  return scores, labels
