"""Turns OpenAI's model solutions to GSM8K problems into trajectories.

  python scripts/convert_gsm8k_solutions.py example_model_solutions.jsonl OUTPUT

The input is published with the data set (github.com/openai/grade-school-math,
grade_school_math/data): a problem a line, with the answers of four models and
whether each is right. They are answers to *test* problems: nothing trained on
them may be scored on the test set.

Every answer is given a line break at its end. The end of the answer is then a
step of its own, and step-level objectives learn the value of a whole answer.
"""

import argparse
import json
import pathlib

from oreo_jax import data

MODELS = (
  "6b_finetuning",
  "6b_verification",
  "175b_finetuning",
  "175b_verification",
)


def read_answers(path: pathlib.Path, problems: int) -> list[data.Trajectory]:
  """Returns four trajectories a problem, of the first `problems` (0: all)."""
  found = []
  with path.open(encoding="utf-8") as lines:
    for number, line in enumerate(lines):
      if problems and number == problems:
        break
      try:
        row = json.loads(line)
        found += [
          data.Trajectory.from_text(
            row["question"],
            row[model]["solution"].rstrip() + "\n",
            float(row[model]["is_correct"]),
            id=f"{number}/{model}",
          )
          for model in MODELS
        ]
      except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
          f"{path}:{number + 1}: not a line of example_model_solutions.jsonl: "
          f"{error!r}"
        ) from error
  return found


def main() -> None:
  """Runs the conversion."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("input", type=pathlib.Path)
  parser.add_argument("output", type=pathlib.Path)
  parser.add_argument("--problems", type=int, default=1000, help="0: all")
  args = parser.parse_args()
  data.save_trajectories(args.output, read_answers(args.input, args.problems))


if __name__ == "__main__":
  main()
