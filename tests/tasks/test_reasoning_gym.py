"""The reasoning_gym extra: full scores only, scorers that raise."""

import pytest

pytest.importorskip("reasoning_gym")

from oreo_jax.tasks import Task, get_task


def make(dataset="basic_arithmetic", **options):
  return get_task("reasoning_gym", dataset=dataset, seed=7, **options)


def test_splits_are_disjoint_and_the_same_again():
  task = make()
  assert isinstance(task, Task)
  questions = {
    split: {p.prompt for p in task.problems(split, 50)}
    for split in ("train", "validation", "test")
  }
  assert all(len(part) == 50 for part in questions.values())
  assert len(set().union(*questions.values())) == 150
  assert make().problems("test", 50) == task.problems("test", 50)


def test_only_a_full_score_counts():
  task = make("letter_counting")
  problem = task.problems("train", 1)[0]
  right = f"So <answer>1</answer>, no: <answer>{problem.answer}</answer>"
  responses = [
    right,
    f"<answer>{problem.answer} or {problem.answer}1</answer>",
    problem.answer,
    "<answer></answer>",
    f"<answer>{problem.answer}",
    "<answer>" + problem.answer * 5000 + "</answer>",
  ]
  rewards = task.grade([problem] * len(responses), responses)
  assert rewards.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_scorer_that_raises_counts_zero():
  task = make()
  problem = task.problems("train", 1)[0]

  def broken(answer, entry):
    raise KeyError("metadata")

  task._items.score_answer = broken
  answer = f"<answer>{problem.answer}</answer>"
  assert task.grade([problem], [answer]).tolist() == [0.0]
  assert task.grading_report() == {"error": 1}


def test_partial_credit_is_none():
  task = make()
  problem = task.problems("train", 1)[0]
  task._items.score_answer = lambda answer, entry: 0.99
  answer = f"<answer>{problem.answer}</answer>"
  assert task.grade([problem], [answer]).tolist() == [0.0]


def test_it_has_no_demonstrations():
  with pytest.raises(ValueError, match="start from a checkpoint"):
    make().demonstrations(1)


def test_questions_that_differ_by_a_blank_are_one():
  task = make()
  questions = ["What is 1 + 1?", "What is 1 +  1?\n", "What is 2 + 2?"]
  task._items = [
    {"question": questions[i % 3], "answer": "2"} for i in range(9)
  ]
  total = 0
  for split in ("train", "validation", "test"):
    count = 0
    # The stream ends, so that asking for one more than there are raises.
    with pytest.raises(IndexError):
      while True:
        count = len(task.problems(split, count + 1))
    total += count
  assert total == 2
