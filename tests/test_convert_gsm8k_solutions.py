"""scripts/convert_gsm8k_solutions.py: published answers as trajectories."""

import json
import pathlib
import subprocess
import sys

from oreo_jax import data

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "convert_gsm8k_solutions.py"
MODELS = (
  "6b_finetuning",
  "6b_verification",
  "175b_finetuning",
  "175b_verification",
)


def problem(question, *right):
  return {"question": question, "ground_truth": "4"} | {
    model: {"solution": f"2+2={4 + i}\nA: {4 + i}", "is_correct": correct}
    for i, (model, correct) in enumerate(zip(MODELS, right, strict=True))
  }


def convert(tmp_path, *lines):
  source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text("\n".join(lines) + "\n", encoding="utf-8")
  done = subprocess.run(
    [sys.executable, SCRIPT, source, output, "--problems=2"],
    capture_output=True,
    text=True,
    check=False,
    env={"PYTHONPATH": str(ROOT)},
  )
  return done, output


def test_four_answers_a_problem_each_ending_in_a_line_break(tmp_path):
  rows = [
    problem("one?", True, False, False, True),
    problem("two?", False, False, False, False),
    problem("not wanted?", True, True, True, True),
  ]
  done, output = convert(tmp_path, *map(json.dumps, rows))
  assert done.returncode == 0, done.stderr
  found = data.load_trajectories(output)
  assert [t.reward for t in found] == [1, 0, 0, 1, 0, 0, 0, 0]
  assert [t.id for t in found[:2]] == ["0/6b_finetuning", "0/6b_verification"]
  assert len({t.problem for t in found[:4]}) == 1
  assert len({t.problem for t in found}) == 2
  row = json.loads(output.read_text(encoding="utf-8").splitlines()[1])
  assert row["prompt"] == "one?"
  assert row["response"] == "2+2=5\nA: 5\n"


def test_another_file_is_one_error_with_its_line(tmp_path):
  good = json.dumps(problem("one?", True, False, False, True))
  done, output = convert(tmp_path, good, '{"question": "two?"}')
  assert done.returncode == 1
  assert "in.jsonl:2: not a line of example_model_solutions" in done.stderr
  assert "Traceback" not in done.stderr
  assert not output.exists()
