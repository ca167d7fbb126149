"""Data-set tasks: rows from every source, formats, splits, errors."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from oreo_jax.tasks import Problem, Task, get_task
from oreo_jax.tasks.rows import read_rows

QUESTIONS = [
  {
    "question": f"Ann has {n} apples and buys {n + 1} more. How many?",
    "answer": f"She has {n}+{n + 1} = <<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1}.\n"
    f"#### {2 * n + 1:,}",
  }
  for n in range(400, 700)
]
PROBLEMS = [
  {
    "problem": f"Halve ${n}$.",
    "solution": f"First \\boxed{{{n}}}. "
    f"Half is $\\boxed{{\\frac{{{n}}}{{2}}}}$.",
    "level": f"Level {n % 5 + 1}",
    "type": "Algebra" if n % 2 else "Geometry",
  }
  for n in range(1, 41)
]


def write_jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
  return str(path)


@pytest.fixture
def gsm8k_file(tmp_path):
  return write_jsonl(tmp_path / "all.jsonl", QUESTIONS)


def prompts(task, split):
  return [problem.prompt for problem in task.problems(split)]


def test_gsm8k_from_a_file(gsm8k_file):
  task = get_task("gsm8k", path=gsm8k_file)
  assert isinstance(task, Task) and task.make_tokenizer() is None
  splits = {s: prompts(task, s) for s in ("train", "validation", "test")}
  assert sum(map(len, splits.values())) == len(QUESTIONS)
  assert len(set().union(*splits.values())) == len(QUESTIONS)
  assert len(splits["train"]) > 200 and len(splits["validation"]) > 10
  assert len(splits["test"]) > 10
  again = get_task("gsm8k", path=gsm8k_file)
  assert again.problems("test") == task.problems("test")
  assert task.problems("train", 3) == task.problems("train")[:3]


def test_gsm8k_demonstrations_are_right(gsm8k_file):
  task = get_task("gsm8k", path=gsm8k_file)
  pairs = task.demonstrations()
  assert [p for p, _ in pairs] == task.problems("train")
  assert task.grade(*zip(*pairs, strict=True)).all()
  problem, answer = pairs[0]
  assert "<<" not in answer and answer.endswith(f"\n#### {problem.answer}")
  assert problem.prompt.endswith("How many?\n")


@pytest.mark.parametrize(
  "answer_format, ending",
  [("####", "#### {}"), ("boxed", "\\boxed{{{}}}"), ("A:", "A: {}")],
)
def test_gsm8k_formats(gsm8k_file, answer_format, ending):
  task = get_task(
    "gsm8k",
    path=gsm8k_file,
    answer_format=answer_format,
    keep_annotations=True,
    prompt="Q: {question} {braces} A:",
  )
  pairs = task.demonstrations(20)
  problem, answer = pairs[0]
  assert answer.split("\n")[-1] == ending.format(problem.answer)
  assert "<<" in answer
  assert problem.prompt.startswith("Q: Ann has")
  assert problem.prompt.endswith("How many? {braces} A:")
  assert task.grade(*zip(*pairs, strict=True)).all()


def test_the_report_tells_how_answers_were_graded(gsm8k_file):
  task = get_task("gsm8k", path=gsm8k_file)
  assert task.grading_report() == {}
  problem = task.problems("train", 1)[0]
  task.grade([problem] * 3, [f"#### {problem.answer}", "none", "#### 0"])
  assert task.grading_report() == {"plain": 2, "no_answer": 1}
  exact = get_task("jsonl", path=gsm8k_file, grading="exact")
  assert exact.grading_report() == {}
  for name in ("maze", "arithmetic"):
    assert get_task(name).grading_report() == {}


def test_votes_agree_on_spellings(gsm8k_file):
  task = get_task("gsm8k", path=gsm8k_file)
  spellings = ["#### 1,000", "A: $1000.00", r"\boxed{1000 \text{ apples}}"]
  assert {task.final_answer(text) for text in spellings} == {"1000"}
  assert task.final_answer(r"\boxed{x + 1}") == "x+1"
  assert task.final_answer("none") == ""


@pytest.mark.parametrize("prompt", ["plain", "boxed", "qwen", "deepseek"])
def test_prompts(gsm8k_file, prompt):
  task = get_task("gsm8k", path=gsm8k_file, prompt=prompt)
  text = task.problems("train", 1)[0].prompt
  assert "Ann has" in text and "{question}" not in text
  assert ("\\boxed{}" in text) == (prompt != "plain")


def test_math_from_a_file(tmp_path):
  path = write_jsonl(tmp_path / "math.jsonl", PROBLEMS)
  task = get_task("math", path=path)
  pairs = task.demonstrations()
  problem, solution = pairs[0]
  number = problem.prompt.split("$")[1]
  # The last boxed answer counts, not the first, and not both as a set.
  assert problem.answer == f"\\frac{{{number}}}{{2}}"
  assert problem.prompt.endswith("within \\boxed{}.\n")
  assert task.grade(*zip(*pairs, strict=True)).all()
  assert not task.grade([problem], [f"#### {problem.answer}"]).any()


def test_math_levels_types_and_another_test_set(tmp_path):
  path = write_jsonl(tmp_path / "math.jsonl", PROBLEMS)
  task = get_task("math", path=path, levels=(4, 5), types=("Algebra",))
  total = sum(
    len(task.problems(split)) for split in ("train", "validation", "test")
  )
  assert total == sum(
    row["level"] in ("Level 4", "Level 5") and row["type"] == "Algebra"
    for row in PROBLEMS
  )
  other = [
    {"problem": row["problem"], "solution": "none", "answer": "7"}
    for row in PROBLEMS[:5]
  ]
  test_path = write_jsonl(tmp_path / "500.jsonl", other)
  task = get_task("math", path=path, test_path=test_path)
  assert [p.answer for p in task.problems("test")] == ["7"] * 5
  assert not set(prompts(task, "test")) & set(prompts(task, "train"))
  rest = prompts(task, "train") + prompts(task, "validation")
  assert len(rest) == len(PROBLEMS) - 5


def test_jsonl_math_and_exact(tmp_path):
  rows = [
    {"prompt": f"say {n}", "answer": n, "response": f"#### {n}"}
    for n in range(60)
  ]
  path = write_jsonl(tmp_path / "own.jsonl", rows)
  problem = Problem("x", "say 5", "5")
  task = get_task("jsonl", path=path)
  assert task.problems("train")[0].prompt.startswith("say ")
  assert task.grade(*zip(*task.demonstrations(), strict=True)).all()
  responses = ["A: 5.0", "A: 5", "5", " 5 \n", "6"]
  assert task.grade([problem] * 5, responses).tolist() == [1, 1, 0, 0, 0]
  exact = get_task("jsonl", path=path, grading="exact")
  assert exact.grade([problem] * 5, responses).tolist() == [0, 1, 1, 1, 0]


def test_a_directory_with_splits(tmp_path):
  write_jsonl(tmp_path / "train.jsonl", QUESTIONS[:200])
  pyarrow.parquet.write_table(
    pyarrow.Table.from_pylist(QUESTIONS[190:230]),
    tmp_path / "test-00000-of-00001.parquet",
  )
  (tmp_path / "README.md").write_text("no rows")
  task = get_task("gsm8k", path=str(tmp_path))
  splits = {s: prompts(task, s) for s in ("train", "validation", "test")}
  # Ten questions are in both files: they stay in test alone.
  assert len(splits["test"]) == 40
  assert len(splits["train"]) + len(splits["validation"]) == 190
  assert 0 < len(splits["validation"]) < 40
  assert len(set().union(*splits.values())) == 230


def test_a_saved_dataset_dict(tmp_path):
  datasets.DatasetDict(
    {
      "train": datasets.Dataset.from_list(QUESTIONS[:50]),
      "valid": datasets.Dataset.from_list(QUESTIONS[50:60]),
      "test": datasets.Dataset.from_list(QUESTIONS[60:80]),
    }
  ).save_to_disk(tmp_path / "saved")
  task = get_task("gsm8k", path=str(tmp_path / "saved"))
  counts = [len(task.problems(s)) for s in ("train", "validation", "test")]
  assert counts == [50, 10, 20]


def test_a_hub_name_goes_to_datasets(monkeypatch):
  asked = []

  def load_dataset(name, subset):
    asked.append((name, subset))
    return datasets.DatasetDict(
      train=datasets.Dataset.from_list(QUESTIONS[:50]),
      test=datasets.Dataset.from_list(QUESTIONS[50:60]),
    )

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  task = get_task("gsm8k")
  assert len(task.problems("test")) == 10
  assert asked == [("openai/gsm8k", "main")]

  def refuse(name, subset):
    raise ConnectionError("no network")

  monkeypatch.setattr(datasets, "load_dataset", refuse)
  with pytest.raises(ValueError, match="openai/gsm8k.*no network.*path"):
    get_task("gsm8k").problems("test")


@pytest.mark.parametrize(
  "content, message",
  [
    (b'{"question": "a", "answer"\n', r"bad\.jsonl:1: broken JSON"),
    (
      b'{"question": "a", "answer": "#### 1"}\n[1]\n',
      r"bad\.jsonl:2: expected a JSON object",
    ),
    (b'{"question": "\xff"}\n', r"bad\.jsonl:1: invalid UTF-8"),
    (b'{"question": "a"}\n', r"bad\.jsonl:1: needs a text in 'answer'"),
    (b'{"question": " ", "answer": "#### 1"}\n', "needs a text in 'question'"),
    (
      b'{"question": "a", "answer": "1"}\n',
      r"bad\.jsonl:1: 'answer' must end in",
    ),
    (b'{"question": "a", "answer": null}\n', "needs a text in 'answer'"),
  ],
)
def test_bad_rows_name_file_and_line(tmp_path, content, message):
  path = tmp_path / "bad.jsonl"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as raised:
    get_task("gsm8k", path=str(path)).problems("train")
  # A question cannot be skipped, so the flag for trajectories is no advice.
  assert "on_error" not in str(raised.value)


def test_bad_sources(tmp_path):
  for path, message in [
    ("no/such/file.jsonl", "no such file"),
    (str(tmp_path / "none"), "no such file"),
    (str(tmp_path), "expected files such as"),
  ]:
    with pytest.raises(ValueError, match=message):
      get_task("gsm8k", path=path).problems("train")
  (tmp_path / "a.txt").write_text("x")
  (tmp_path / "a.parquet").write_text("x")
  with pytest.raises(ValueError, match="a.txt: expected a file"):
    read_rows(str(tmp_path / "a.txt"))
  with pytest.raises(ValueError, match="a.parquet is no readable Parquet file"):
    read_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
  "name, options, word",
  [
    ("gsm8k", {"prompt": "Q:"}, "prompt"),
    ("gsm8k", {"answer_format": "="}, "answer_format"),
    ("gsm8k", {"pth": "x"}, "pth"),
    ("math", {"markers": ("=",)}, "markers"),
    ("jsonl", {}, "path"),
    ("jsonl", {"path": "x", "grading": "fuzzy"}, "grading"),
  ],
)
def test_bad_options(name, options, word):
  with pytest.raises(ValueError, match=word):
    get_task(name, **options)
