"""The maze: verifier table, teacher, splits, tokenizer, determinism."""

import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from oreo_jax.tasks import Problem, Task, get_task
from oreo_jax.tasks.maze import MazeTask

PROMPT = "start e3 goal c6 walls d5 e6 b3 c1 f1 a6 d4\n"

# Response, what is wrong with it ("" = right).
VERDICTS = [
  ("left d3\nleft c3\ndown c4\ndown c5\ndown c6\n", ""),
  ("up e2\ndown e3\nleft d3\nleft c3\ndown c4\ndown c5\ndown c6\n", ""),
  ("left d3\ndown d4\nleft c4\ndown c5\ndown c6\n", "walks into a wall"),
  ("left d3\nleft c3\ndown c4\ndown c5\ndown c6", "the last line is not ended"),
  ("left d3\nleft c3\ndown c4\ndown c5\n", "ends before the goal"),
  ("left d3\nleft c3\ndown c4\ndown c5\ndown c6\nup c5\n", "moves on"),
  ("left d3\nleft c3\ndown c4\ndown c5\ndown c6\n\n", "moves on"),
  ("down c6\n", "not a move"),
  ("right d3\nleft c3\ndown c4\ndown c5\ndown c6\n", "not a move"),
  ("left c3\ndown c4\ndown c5\ndown c6\n", "not a move"),
  ("left d3\nleft c3 \ndown c4\ndown c5\ndown c6\n", "not a move"),
  ("left  d3\nleft c3\ndown c4\ndown c5\ndown c6\n", "not a move"),
  ("d3\nc3\nc4\nc5\nc6\n", "not a move"),
  ("left d3\n\nleft c3\ndown c4\ndown c5\ndown c6\n", "not a move"),
  ("right f3\nright g3\n", "not a move"),
  ("", "ends before the goal"),
  ("\n", "not a move"),
  ("Left d3\nleft c3\ndown c4\ndown c5\ndown c6\n", "not a move"),
  ("up e2\ndown e3\n" * 7, "ends before the goal"),
  ("up e2\ndown e3\n" * 8, "too many moves"),
  (
    "up e2\ndown e3\n" * 5 + "left d3\nleft c3\ndown c4\ndown c5\ndown c6\n",
    "too many moves",
  ),
]


@pytest.mark.parametrize("response, fault", VERDICTS)
def test_verifier_table(response, fault):
  task, problem = get_task("maze"), Problem("x", PROMPT)
  found = task.find_fault(problem, response)
  assert found.startswith(fault) and bool(found) == bool(fault)
  reward = task.grade([problem], [response])
  assert reward.dtype == np.float32
  assert reward.tolist() == [float(not fault)]


def test_cell_lines_are_checked_alike():
  task = get_task("maze", line_format="cell")
  problem = Problem("x", PROMPT)
  responses = ["d3\nc3\nc4\nc5\nc6\n", "d3\nd4\nc4\nc5\nc6\n", "e3\nd3\nc3\n"]
  assert task.grade([problem] * 3, responses).tolist() == [1.0, 0.0, 0.0]


def shortest(prompt, size):
  """Breadth-first search that shares nothing with the task."""
  words = prompt.split()
  start, goal, walls = words[1], words[3], set(words[5:])
  depth, edge, seen = 0, {start}, {start}
  while goal not in edge:
    near = {
      chr(ord(c[0]) + right) + str(int(c[1]) + down)
      for c in edge
      for right, down in [(0, 1), (0, -1), (1, 0), (-1, 0)]
      if 0 <= ord(c[0]) - 97 + right < size and 1 <= int(c[1]) + down <= size
    }
    edge = near - walls - seen
    assert edge, "no path"
    seen |= edge
    depth += 1
  return depth


@pytest.mark.parametrize(
  "variant, size, walls, low, high",
  [("easy", 5, 5, 3, 6), ("default", 6, 7, 4, 9), ("hard", 8, 16, 6, 14)],
)
def test_maps_are_as_promised(variant, size, walls, low, high):
  problems = get_task("maze", variant=variant).problems("test", 200)
  for problem in problems:
    cells = problem.prompt.split()[5:]
    assert len(set(cells)) == walls == len(cells)
    assert low <= shortest(problem.prompt, size) <= high


def test_a_careful_teacher_walks_shortest_paths():
  task = get_task("maze", forget=0.0)
  problems, answers = zip(*task.demonstrations(300), strict=True)
  assert task.grade(problems, answers).all()
  for problem, answer in zip(problems, answers, strict=True):
    assert answer.count("\n") == shortest(problem.prompt, 6)


@pytest.mark.parametrize(
  "variant, rate", [("easy", 0.717), ("default", 0.595), ("hard", 0.353)]
)
def test_teacher_success_rate(variant, rate):
  task = get_task("maze", variant=variant)
  problems, answers = zip(*task.demonstrations(2000), strict=True)
  assert abs(task.grade(problems, answers).mean() - rate) < 0.04


def board(prompt):
  words = prompt.split()
  return words[1], words[3], frozenset(words[5:])


def test_splits_share_no_map_whatever_the_seed():
  train = get_task("maze", size=4, walls=3, min_path=3, max_path=4)
  other = get_task("maze", size=4, walls=3, min_path=3, max_path=4, seed=5)
  maps = {
    split: {
      board(p.prompt) for t in (train, other) for p in t.problems(split, 1000)
    }
    for split in ("train", "validation", "test")
  }
  assert not maps["train"] & maps["validation"]
  assert not maps["train"] & maps["test"]
  assert not maps["validation"] & maps["test"]


def test_no_map_comes_twice():
  problems = get_task("maze").problems("train", 20_000)
  assert len({board(p.prompt) for p in problems}) == len(problems) == 20_000
  assert len({p.id for p in problems}) == 20_000


def test_count_takes_a_prefix_and_defaults_to_the_size():
  task = get_task("maze", test_size=50)
  assert task.problems("test", 20) == task.problems("test")[:20]
  assert len(task.problems("test")) == 50
  assert task.problems("test", 0) == []
  assert [p for p, _ in task.demonstrations(9)] == task.problems("train", 9)


FINGERPRINT = """
import hashlib
from oreo_jax.tasks import get_task
task = get_task("maze", seed=3)
text = repr(task.problems("validation", 100)) + repr(task.demonstrations(100))
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_another_process_draws_the_same():
  task = get_task("maze", seed=3)
  text = repr(task.problems("validation", 100)) + repr(task.demonstrations(100))
  ours = hashlib.sha256(text.encode()).hexdigest()
  theirs = subprocess.run(
    [sys.executable, "-c", FINGERPRINT],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert theirs.stdout.strip() == ours


@pytest.mark.parametrize("line_format, tokens", [("move", 3), ("cell", 2)])
def test_tokenizer_round_trip(line_format, tokens):
  task = get_task("maze", line_format=line_format)
  tokenizer = task.make_tokenizer()
  for problem, answer in task.demonstrations(200):
    text = problem.prompt + answer
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    steps = tokenizer(answer)["input_ids"]
    assert len(steps) == tokens * answer.count("\n")
    assert ids == tokenizer(problem.prompt)["input_ids"] + steps
  assert tokenizer.bos_token_id is None
  assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_any_tokens_survive_decoding():
  tokenizer = get_task("maze").make_tokenizer()
  rng = np.random.default_rng(0)
  for _ in range(300):
    ids = rng.integers(3, len(tokenizer), rng.integers(0, 12)).tolist()
    ids[1::3] = [tokenizer.convert_tokens_to_ids("\n")] * len(ids[1::3])
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids, text
    ended = tokenizer.decode(
      [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id],
      skip_special_tokens=True,
    )
    assert ended == text


def test_tokenizer_survives_saving(tmp_path):
  from transformers import AutoTokenizer

  tokenizer = get_task("maze").make_tokenizer()
  tokenizer.save_pretrained(tmp_path)
  loaded = AutoTokenizer.from_pretrained(tmp_path)
  text = PROMPT + VERDICTS[0][0]
  assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
  assert loaded.decode(loaded(text)["input_ids"]) == text
  assert loaded.eos_token == tokenizer.eos_token
  assert loaded.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
  "options, word",
  [
    ({"size": 10}, "size"),
    ({"walls": 40}, "walls"),
    ({"min_path": 10}, "min_path"),
    ({"max_moves": 5}, "max_moves"),
    ({"forget": 1.5}, "forget"),
    ({"line_format": "words"}, "line_format"),
    ({"variant": "huge"}, "variant"),
    ({"wals": 3}, "wals"),
  ],
)
def test_bad_options(options, word):
  with pytest.raises(ValueError, match=word):
    get_task("maze", **options)


def test_bad_calls():
  task = get_task("maze")
  with pytest.raises(ValueError, match="split"):
    task.problems("dev")
  with pytest.raises(ValueError, match="one response a problem"):
    task.grade([Problem("x", PROMPT)], [])
  with pytest.raises(ValueError, match="not a prompt"):
    task.grade([Problem("x", "hello")], ["left d3\n"])
  with pytest.raises(ValueError, match="6 x 6"):
    task.grade([Problem("x", "start a1 goal h8 walls a2\n")], [""])
  with pytest.raises(ValueError, match="unknown task"):
    get_task("amaze")
  tiny = MazeTask(size=2, walls=0, min_path=2, max_path=2, max_moves=2)
  with pytest.raises(ValueError, match="ask for fewer"):
    tiny.problems("train", 100)


def test_it_is_a_task():
  task = get_task("maze")
  assert isinstance(task, Task)
  assert task.name == "maze"
