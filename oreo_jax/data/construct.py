"""Training sets made of collected trajectories.

All choices are made a problem at a time from (seed, problem), so that they do
not depend on what else the file holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from oreo_jax.data.schema import Pair, Trajectory, stable_hash
from oreo_jax.data.tokens import Tokenized, map_tokens


def by_problem(
  trajectories: Iterable[Trajectory],
) -> dict[str, list[Trajectory]]:
  """Groups trajectories by problem, in the order of first appearance."""
  groups: dict[str, list[Trajectory]] = {}
  for trajectory in trajectories:
    groups.setdefault(trajectory.problem, []).append(trajectory)
  return groups


def select_correct(
  trajectories: Iterable[Trajectory], *, threshold: float = 0.5
) -> list[Trajectory]:
  """Keeps what rejection sampling trains on: rewards above the threshold."""
  return [t for t in trajectories if t.reward > threshold]


def select_standard(
  trajectories: Iterable[Trajectory], *, responses: int = 10
) -> list[Trajectory]:
  """Keeps the first `responses` trajectories of every problem."""
  return [
    trajectory
    for group in by_problem(trajectories).values()
    for trajectory in group[:responses]
  ]


def select_balanced(
  trajectories: Iterable[Trajectory],
  *,
  responses: int = 16,
  max_correct: int = 4,
  max_wrong: int = 4,
  seed: int = 0,
  threshold: float = 0.5,
) -> list[Trajectory]:
  """Keeps about as many correct as wrong trajectories of every problem.

  Of the first `responses`: at most `max_wrong` wrong ones, at most
  `max_correct` correct ones and not more than the wrong ones kept, but one
  correct one if there is any. Which ones is random.

  Args:
    trajectories: of any number of problems.
    responses: trajectories of a problem to choose from.
    max_correct: most correct ones kept.
    max_wrong: most wrong ones kept.
    seed: of the choice.
    threshold: a trajectory is correct if its reward is above.

  Returns:
    The chosen ones, a problem after the other, in the order given.

  Source: arXiv 2412.16145, appendix A.
  """
  selected: list[Trajectory] = []
  for problem, group in by_problem(trajectories).items():
    group = group[:responses]
    correct = [i for i, t in enumerate(group) if t.reward > threshold]
    wrong = [i for i, t in enumerate(group) if not t.reward > threshold]
    num_wrong = min(len(wrong), max_wrong)
    # A problem that was always solved still gives one answer to imitate.
    num_correct = min(len(correct), max_correct, max(num_wrong, 1))
    rng = _rng(seed, problem)
    chosen = [
      *rng.permutation(correct)[:num_correct],
      *rng.permutation(wrong)[:num_wrong],
    ]
    selected.extend(group[int(index)] for index in sorted(chosen))
  return selected


def preference_pairs(
  trajectories: Iterable[Trajectory],
  *,
  max_pairs: int = 6,
  seed: int = 0,
  threshold: float = 0.5,
) -> list[Pair]:
  """Returns the given pairs, and pairs of correct and wrong trajectories.

  Trajectories of a preference file name the pair they come from: each pair is
  taken as given. Of the others, up to `max_pairs` pairs a problem are drawn
  without replacement from all its (correct, wrong) combinations: no pair
  twice, but a trajectory may stand in several. (The paper draws 6 of 10
  responses and 10 of 4 + 4, more than there are disjoint pairs.)

  Args:
    trajectories: of any number of problems.
    max_pairs: most pairs drawn of a problem; given pairs do not count.
    seed: of the draw.
    threshold: a trajectory is correct if its reward is above.

  Returns:
    The pairs, a problem after the other, the given ones of each first.

  Raises:
    ValueError: two trajectories of a given pair have the same reward.

  Source: arXiv 2412.16145, appendix A.
  """
  pairs = []
  for problem, group in by_problem(trajectories).items():
    pairs.extend(_given_pairs(group))
    alone = [t for t in group if not t.pair]
    correct = [t for t in alone if t.reward > threshold]
    wrong = [t for t in alone if not t.reward > threshold]
    combinations = len(correct) * len(wrong)
    if combinations:
      # Combination i is correct answer i // W with wrong answer i % W.
      drawn = _rng(seed, problem).permutation(combinations)[:max_pairs]
      pairs.extend(
        Pair(correct[i // len(wrong)], wrong[i % len(wrong)])
        for i in drawn.tolist()
      )
  return pairs


def _given_pairs(group: Iterable[Trajectory]) -> list[Pair]:
  """Returns the pairs that the trajectories of a problem name."""
  members: dict[str, list[Trajectory]] = {}
  for trajectory in group:
    if trajectory.pair:
      members.setdefault(trajectory.pair, []).append(trajectory)
  pairs = []
  for sides in members.values():
    # Files that were joined may use a name twice, but keep pairs together. An
    # attempt whose other half was left out is not compared with anything.
    for one, other in zip(sides[::2], sides[1::2], strict=False):
      if one.reward == other.reward:
        raise ValueError(
          f"{one.place} and {other.place} name the same pair {one.pair!r}, but"
          f" both have the reward {one.reward}; the better one needs more"
        )
      better = one.reward > other.reward
      pairs.append(Pair(one, other) if better else Pair(other, one))
  return pairs


def rotate_completions(
  rows: Sequence[Sequence[Tokenized]], *, row_length: int
) -> list[list[Tokenized]]:
  """Gives every prompt of a batch the completion of the next sequence.

  KTO estimates its reference point on such mismatched completions. Sequence k
  of row b keeps its place, so the two batches have the same segments; since
  only the last sequence of a row takes a completion from another row, it alone
  can become too long, and is cut at the end of the row.

  Args:
    rows: the sequences of every row of the whole batch, as packed.
    row_length: T, slots of a row.

  Returns:
    The mismatched sequences of every row; rewards are zero.
  """
  flat = [sequence for row in rows for sequence in row]
  following = iter([*flat[1:], *flat[:1]])
  rotated = []
  for row in rows:
    room = row_length
    mismatched = []
    for sequence in row:
      joined = _mismatch(sequence, next(following))
      mismatched.append(_cut(joined, room + 1))
      room -= len(mismatched[-1].tokens) - 1
    rotated.append(mismatched)
  return rotated


def _mismatch(sequence: Tokenized, other: Tokenized) -> Tokenized:
  """Joins the prompt of one sequence and the completion of another."""
  # The prompt is all that comes before the first action.
  end = int(sequence.action_mask.argmax())
  start = int(other.action_mask.argmax())

  def join(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.concatenate([ours[:end], theirs[start:]])

  joined = map_tokens(join, sequence, other)
  return joined._replace(rewards=np.zeros_like(joined.rewards))


def _cut(sequence: Tokenized, length: int) -> Tokenized:
  if len(sequence.tokens) <= length:
    return sequence
  return map_tokens(lambda array: array[:length], sequence)


def _rng(seed: int, problem: str) -> np.random.Generator:
  return np.random.default_rng(stable_hash(seed, problem))
