"""One rule for the splits: who is in which, evenly, and the same for ever."""

import hashlib
import json

import numpy as np
import pytest

from oreo_jax.tasks import get_task
from oreo_jax.tasks.drawing import code_hashes
from oreo_jax.tasks.splits import split_indices, text_hash, text_split
from oreo_jax.tasks.task import SPLITS


def test_a_hash_by_hand():
  hashes = np.array([10, 7, 8, 9, 19, 2**64 - 1], np.uint64)
  # 2**64 - 1 ends in the digit 5.
  assert split_indices(hashes).tolist() == [0, 0, 1, 2, 2, 0]


@pytest.mark.parametrize(
  "hashes",
  [
    np.array([text_hash(f"problem {i}") for i in range(20_000)], np.uint64),
    code_hashes(np.stack(np.divmod(np.arange(20_000), 100), axis=1)),
  ],
  ids=["texts", "codes"],
)
def test_the_splits_are_8_to_1_to_1(hashes):
  assert len(np.unique(hashes)) == len(hashes)
  shares = np.bincount(split_indices(hashes)) / len(hashes)
  # Three standard deviations of a share of a tenth are 0.0064.
  np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.0085)


def test_texts_stay_where_they_were():
  splits = "".join(
    text_split(f"q{i}")[0] + text_split(f"q{i}")[1] for i in range(12)
  )
  assert splits == "trtrtrtrtrvatetrtetrvatr"


def test_white_space_makes_no_other_problem():
  for text in ("a b", " a b", "a  b\n", "a\tb", "a\u00a0b"):
    assert text_hash(text) == text_hash("a b")
    assert text_split(text) == text_split("a b")
  assert text_hash("ab") != text_hash("a b")


# Published figures are of these problems.
DRAWN = {
  ("maze", "train"): "1ed2fc323f11183e",
  ("maze", "validation"): "64c55b663bbc1d33",
  ("maze", "test"): "23a410d76b1e55e7",
  ("arithmetic", "train"): "6f9d4616737db893",
  ("arithmetic", "validation"): "0038be30c8a2db80",
  ("arithmetic", "test"): "83384033b8d9ffb6",
}


@pytest.mark.parametrize("name, split", DRAWN)
def test_drawn_problems_stay_what_they_were(name, split):
  prompts = [problem.prompt for problem in get_task(name).problems(split, 64)]
  digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
  assert digest[:16] == DRAWN[name, split]


def test_rows_that_differ_by_a_blank_are_one_problem(tmp_path):
  rows = [
    {"prompt": prompt, "answer": str(i)}
    for i in range(100)
    for prompt in (f"add {i}", f"add  {i}", f" add {i}\n")
  ]
  path = tmp_path / "own.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  task = get_task("jsonl", path=str(path))
  prompts = [p.prompt for split in SPLITS for p in task.problems(split)]
  assert sorted(prompts) == sorted(f"add {i}" for i in range(100))
