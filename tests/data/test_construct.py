import itertools

import pytest

from oreo_jax.data import (
  Trajectory,
  construct,
  load_trajectories,
  save_trajectories,
)


def attempts(problem, correct, wrong):
  """Correct and wrong attempts in turn."""
  rewards = [
    r
    for pair in itertools.zip_longest([1.0] * correct, [0.0] * wrong)
    for r in pair
    if r is not None
  ]
  return [
    Trajectory.from_text(problem, f"a{i}", r, id=f"{problem}/{i}")
    for i, r in enumerate(rewards)
  ]


@pytest.mark.parametrize(
  "correct, wrong, expected",
  [
    # At most four each, not more correct than wrong, one correct at least.
    (8, 8, (4, 4)),
    (14, 2, (2, 2)),
    (16, 0, (1, 0)),
    (0, 16, (0, 4)),
    (1, 15, (1, 4)),
    (15, 1, (1, 1)),
    (3, 13, (3, 4)),
    (1, 0, (1, 0)),
  ],
)
def test_balanced_counts(correct, wrong, expected):
  kept = construct.select_balanced(attempts("p", correct, wrong))
  rewards = [t.reward for t in kept]
  assert (rewards.count(1.0), rewards.count(0.0)) == expected
  assert len({t.id for t in kept}) == len(kept)


def test_balanced_choice_is_random_but_fixed():
  data = attempts("p", 8, 8) + attempts("q", 8, 8)
  kept = construct.select_balanced(data)
  assert kept == construct.select_balanced(data)
  # What is kept of a problem does not depend on the other problems.
  assert kept[8:] == construct.select_balanced(data[16:])
  assert kept != construct.select_balanced(data, seed=1)
  positions = [data.index(t) for t in kept]
  assert positions == sorted(positions)
  # Only the first sixteen of a problem count.
  extra = attempts("p", 20, 20)
  assert {t.id for t in construct.select_balanced(extra)} <= {
    t.id for t in extra[:16]
  }


def test_standard_and_correct():
  data = attempts("p", 8, 8) + attempts("q", 1, 2)
  kept = construct.select_standard(data, responses=5)
  assert [t.id for t in kept] == [
    *[f"p/{i}" for i in range(5)],
    *[f"q/{i}" for i in range(3)],
  ]
  assert len(construct.select_correct(data)) == 9
  assert all(t.reward == 1.0 for t in construct.select_correct(data))
  assert construct.select_correct(data, threshold=1.0) == []


@pytest.mark.parametrize(
  "correct, wrong, max_pairs, expected",
  [(5, 5, 6, 6), (1, 3, 6, 3), (4, 4, 10, 10), (5, 0, 6, 0), (0, 5, 6, 0)],
)
def test_preference_pairs(correct, wrong, max_pairs, expected):
  data = attempts("p", correct, wrong) + attempts("q", 1, 1)
  pairs = construct.preference_pairs(data, max_pairs=max_pairs)
  assert len(pairs) == expected + 1
  assert len({(a.id, b.id) for a, b in pairs}) == len(pairs)
  for chosen, rejected in pairs:
    assert (chosen.reward, rejected.reward) == (1.0, 0.0)
    assert chosen.problem == rejected.problem
  assert pairs == construct.preference_pairs(data, max_pairs=max_pairs)
  if expected > 3:
    again = construct.preference_pairs(data, max_pairs=max_pairs, seed=1)
    assert again != pairs


def preferences(*answers, prompt="q"):
  return [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for chosen, rejected in answers
  ]


def answers_of(pairs):
  return [(chosen.response, rejected.response) for chosen, rejected in pairs]


@pytest.mark.parametrize(
  "answers",
  [
    # Not all right x wrong pairs, which would add (c1, r2) and (c2, r1).
    [("c1", "r1"), ("c2", "r2")],
    # A ranking a > b > c; by rewards alone b would be compared with itself.
    [("a", "b"), ("b", "c")],
    # Given pairs are all taken, whatever the number of pairs drawn.
    [(f"c{i}", f"r{i}") for i in range(20)],
  ],
)
def test_a_preference_file_gives_its_pairs(tmp_path, answers):
  loaded = load_trajectories(preferences(*answers))
  assert answers_of(construct.preference_pairs(loaded)) == answers
  # The format that this project writes keeps them.
  path = tmp_path / "t.jsonl"
  save_trajectories(path, loaded)
  assert answers_of(construct.preference_pairs(load_trajectories(path))) == (
    answers
  )


def test_given_pairs_stay_apart_from_others():
  given = load_trajectories(preferences(("c", "r")))
  alone = [
    Trajectory.from_text("q", "right", 1.0),
    Trajectory.from_text("q", "wrong", 0.0),
  ]
  pairs = construct.preference_pairs([*given, *alone])
  assert answers_of(pairs) == [("c", "r"), ("right", "wrong")]
  # What was left of a pair is compared with nothing.
  assert answers_of(construct.preference_pairs([given[0], *alone])) == [
    ("right", "wrong")
  ]


def test_rows_of_one_id_and_joined_files_keep_their_pairs():
  rows = preferences(("c1", "r1"), ("c2", "r2"))
  rows = [row | {"id": "q7"} for row in rows]
  expected = [("c1", "r1"), ("c2", "r2")]
  loaded = load_trajectories(rows)
  assert answers_of(construct.preference_pairs(loaded)) == expected
  # Two files of one name: "row 1" names a pair of each.
  twice = [*loaded, *load_trajectories(preferences(("c3", "r3")))]
  assert sorted(answers_of(construct.preference_pairs(twice))) == [
    *expected,
    ("c3", "r3"),
  ]


def test_a_pair_needs_a_better_side():
  sides = [
    Trajectory.from_text("q", text, 1.0, id=text, pair="p") for text in "ab"
  ]
  with pytest.raises(ValueError, match=r"id a.*id b.*pair 'p'.*reward 1\.0"):
    construct.preference_pairs(sides)
  better = construct.preference_pairs(
    [sides[0], Trajectory.from_text("q", "c", 1.5, pair="p")]
  )
  assert answers_of(better) == [("c", "a")]
