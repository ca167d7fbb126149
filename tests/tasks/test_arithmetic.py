"""Arithmetic: verifier and step tables, teacher, luck, splits, tokenizer."""

import hashlib
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from oreo_jax.tasks import Problem, Task, get_task
from oreo_jax.tasks.arithmetic import _operate
from oreo_jax.tasks.expression_shapes import expression_shapes

PROBLEM = Problem("x", "(85-(23+38))*7\n", "168")
RIGHT = "23+38=61\n85-61=24\n24*7=168\n"

# Response, reward, index of the first wrong step.
VERDICTS = [
  (RIGHT, 1, None),
  ("24*7=168\n", 1, 0),
  ("23+38=51\n85-51=34\n24*7=168\n", 1, 0),
  ("23+38=61\n85-61=24\n24*7=168", 1, 2),
  ("23+38=61\n85-61=24\n24*7=167\n", 0, 2),
  ("23+38=61\n85-61=34\n34*7=238\n", 0, 1),
  ("23+38=51\n85-51=34\n34*7=238\n", 0, 0),
  ("23+38=61\n85-61=24\n", 0, 2),
  ("38+23=61\n85-61=24\n24*7=168\n", 1, 0),
  ("23+38=61\n24*7=168\n", 1, 1),
  (RIGHT + "168-0=168\n", 1, 3),
  (RIGHT + "\n", 0, 3),
  ("23+38=61\n85-61=24\n24*7=0168\n", 0, 2),
  ("23+38=61\n85-61=24\n24*7= 168\n", 0, 2),
  ("23+38=61\n85-61=24\n24*7=168 \n", 0, 2),
  ("23+38=61\n\n85-61=24\n24*7=168\n", 1, 1),
  ("168\n", 0, 0),
  ("=168\n", 1, 0),
  ("", 0, 0),
  ("\n", 0, 0),
]


@pytest.mark.parametrize("response, reward, wrong", VERDICTS)
def test_verdict_table(response, reward, wrong):
  task = get_task("arithmetic")
  graded = task.grade([PROBLEM], [response])
  assert graded.dtype == np.float32 and graded.tolist() == [reward]
  assert task.first_wrong_step(PROBLEM, response) == wrong


def test_steps_may_come_in_any_order():
  task = get_task("arithmetic")
  problem = Problem("x", "((10+20)+3)-(50-9)\n", "-8")
  answer = "50-9=41\n10+20=30\n30+3=33\n33-41=-8\n"
  assert task.first_wrong_step(problem, answer) is None
  assert task.grade([problem], [answer]).tolist() == [1.0]


# Operation, operands, exact result, result with the carries forgotten.
CARRIES = [
  ("+", 23, 38, 61, 51),
  ("+", 23, 31, 54, 54),
  ("+", 85, 61, 146, 146),
  ("+", 199, 2, 201, 191),
  ("+", 999, 999, 1998, 1888),
  ("-", 61, 38, 23, 37),
  ("-", 105, 61, 44, 164),
  ("-", 98, 61, 37, 37),
  ("*", 24, 7, 168, 148),
  ("*", 108, 9, 972, 902),
  ("*", 11, 9, 99, 99),
]


@pytest.mark.parametrize("sign, a, b, exact, forgotten", CARRIES)
def test_carries(sign, a, b, exact, forgotten):
  operator = np.array(["+-*".index(sign)] * 2)
  results = _operate(
    operator, np.array([a] * 2), np.array([b] * 2), np.array([False, True])
  )
  assert results.tolist() == [exact, forgotten]


@pytest.mark.parametrize("variant", ["easy", "default", "hard"])
def test_answers_are_what_python_says(variant):
  operations = {"easy": 3, "default": 4, "hard": 5}[variant]
  for problem in get_task("arithmetic", variant=variant).problems("test", 500):
    assert re.fullmatch(r"[-+*()\d]+\n", problem.prompt)
    assert str(eval(problem.prompt)) == problem.answer
    assert len(re.findall(r"[-+*]", problem.prompt)) == operations


def test_a_careful_teacher_is_always_right():
  task = get_task("arithmetic", variant="hard", forget=0.0, slip=0.0)
  pairs = task.demonstrations(500)
  assert task.grade(*zip(*pairs, strict=True)).all()
  assert all(task.first_wrong_step(*pair) is None for pair in pairs)


@pytest.mark.parametrize(
  "variant, rate", [("easy", 0.589), ("default", 0.489), ("hard", 0.388)]
)
def test_rewarded_answers_are_right_not_lucky(variant, rate):
  task = get_task("arithmetic", variant=variant)
  pairs = task.demonstrations(4000)
  rewards = task.grade(*zip(*pairs, strict=True))
  assert abs(rewards.mean() - rate) < 0.04
  wrong = np.array([task.first_wrong_step(*p) is not None for p in pairs])
  assert not (~wrong & (rewards == 0)).any()
  assert (wrong & (rewards == 1)).sum() < 0.01 * rewards.sum()


def test_right_answers_are_spread_out():
  answers = [p.answer for p in get_task("arithmetic").problems("train", 5000)]
  _, counts = np.unique(answers, return_counts=True)
  assert len(counts) > 800 and counts.max() < 0.01 * len(answers)


def test_splits_share_no_expression_whatever_the_seed():
  prompts = {
    split: {
      problem.prompt
      for seed in (0, 1)
      for problem in get_task("arithmetic", operations=1, seed=seed).problems(
        split, 500
      )
    }
    for split in ("train", "validation", "test")
  }
  assert not prompts["train"] & prompts["validation"]
  assert not prompts["train"] & prompts["test"]
  assert not prompts["validation"] & prompts["test"]


def test_count_takes_a_prefix_of_distinct_problems():
  task = get_task("arithmetic", validation_size=30)
  assert task.problems("validation", 9) == task.problems("validation")[:9]
  assert len({p.prompt for p in task.problems("train", 9000)}) == 9000
  assert [p for p, _ in task.demonstrations(9)] == task.problems("train", 9)


FINGERPRINT = """
import hashlib
from oreo_jax.tasks import get_task
text = repr(get_task("arithmetic", seed=3).demonstrations(100))
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_another_process_draws_the_same():
  text = repr(get_task("arithmetic", seed=3).demonstrations(100))
  theirs = subprocess.run(
    [sys.executable, "-c", FINGERPRINT],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  ours = hashlib.sha256(text.encode()).hexdigest()
  assert theirs.stdout.strip() == ours


def test_tokenizer_round_trip():
  task = get_task("arithmetic", variant="hard")
  tokenizer = task.make_tokenizer()
  for problem, answer in task.demonstrations(200):
    text = problem.prompt + answer
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    ended = [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ended, skip_special_tokens=True) == text
  assert tokenizer.bos_token_id is None
  assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_any_characters_survive_the_tokenizer():
  tokenizer = get_task("arithmetic").make_tokenizer()
  text = "\n\n(1+\n2)==-*)\n"
  assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
  "options, word",
  [
    ({"operations": 7}, "operations"),
    ({"max_value": 10}, "max_value"),
    ({"forget": -1}, "forget"),
    ({"slip": 2}, "slip"),
    ({"variant": "huge"}, "variant"),
  ],
)
def test_bad_options(options, word):
  with pytest.raises(ValueError, match=word):
    get_task("arithmetic", **options)


def test_it_is_a_task():
  assert isinstance(get_task("arithmetic"), Task)


def test_shapes_by_hand():
  # (a.b).c does 0.1 first, whose result is value 3; a.(b.c) does 1.2 first.
  assert {tuple(map(tuple, shape)) for shape in expression_shapes(2)} == {
    ((0, 1), (3, 2)),
    ((1, 2), (0, 3)),
  }


@pytest.mark.parametrize("operations, catalan", [(1, 1), (3, 5), (6, 132)])
def test_there_are_as_many_shapes_as_binary_trees(operations, catalan):
  shapes = expression_shapes(operations)
  assert shapes.shape == (catalan, operations, 2)
  assert len(np.unique(shapes, axis=0)) == catalan
  # Every value but the last is taken once, and none before it is there.
  values = np.sort(shapes.reshape(catalan, -1), axis=1)
  assert (values == np.arange(2 * operations)).all()
  done = operations + 1 + np.arange(operations)
  assert (shapes < done[:, None]).all()
