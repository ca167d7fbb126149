"""Several processes grade their shares, and all get all the grades."""

import json
import shutil

import jax
import numpy as np
import pytest
from oracles import processes, runs

from oreo_jax import hosts
from oreo_jax.config import EvaluateConfig, to_dict
from oreo_jax.rollout import grade_texts, grading_counts
from oreo_jax.tasks import Problem


class Verifier:
  """Says "right" is right, and remembers what it was asked."""

  def __init__(self):
    self.asked = []

  def grade(self, problems, responses):
    self.asked += [
      (problem.id, response)
      for problem, response in zip(problems, responses, strict=True)
    ]
    return np.array([r.startswith("right") for r in responses], np.float32)

  def grading_report(self):
    rights = sum(response.startswith("right") for _, response in self.asked)
    return {"equal": rights, "different": len(self.asked) - rights}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_share_a_process_and_all_the_grades(monkeypatch, count):
  problems = [Problem(str(i // 2), "x") for i in range(10)]
  texts = [f"{'right' if i % 3 else 'wrong'} {i}" for i in range(10)]
  finished = np.arange(10) != 4
  monkeypatch.setattr(jax, "process_count", lambda: count)
  said, verifiers = [], []
  # What the processes say is known once each has been asked.
  for everything in (None, said):
    for index in range(count):
      monkeypatch.setattr(jax, "process_index", lambda index=index: index)
      verifier = Verifier()

      def gather(value, everything=everything, verifier=verifier):
        if everything is None:
          said.append(value)
          verifiers.append(verifier)
        return everything or [value]

      monkeypatch.setattr(hosts, "gather", gather)
      rewards = grade_texts(verifier, problems, texts, finished)
      if everything:
        want = [0, 1, 1, 0, 0, 1, 0, 1, 1, 0]
        np.testing.assert_array_equal(rewards, np.float32(want))
        assert rewards.dtype == np.float32
  asked = [pair for verifier in verifiers for pair in verifier.asked]
  assert sorted(asked, key=lambda pair: texts.index(pair[1])) == [
    (str(i // 2), text) for i, text in enumerate(texts)
  ]
  if count > 1:
    assert max(len(v.asked) for v in verifiers) < len(texts)


def test_counts_of_all_processes_are_added(monkeypatch):
  reports = [{"equal": 2, "no_answer": 1}, {"equal": 3}, {}]
  monkeypatch.setattr(hosts, "gather", lambda mine: [mine, *reports[1:]])
  verifier = Verifier()
  monkeypatch.setattr(verifier, "grading_report", lambda: reports[0])
  assert grading_counts(verifier) == {"equal": 5, "no_answer": 1}


_STAGES = """
import json

from oreo_jax.config import from_dict
from oreo_jax.stages import STAGES, Workspace

jax.config.update("jax_disable_most_optimizations", True)
config = from_dict(json.loads(sys.argv[4]))
workspace = Workspace(config, sys.argv[5])
kind = type(workspace.task)
grade, graded = kind.grade, []

def remember(task, problems, responses):
  graded.extend(problem.id for problem in problems)
  return grade(task, problems, responses)

kind.grade = remember
kind.grading_report = lambda task: {"graded": len(graded)}
with jax.set_mesh(workspace.mesh):
  for stage in sys.argv[6:]:
    STAGES[stage].run(workspace, lambda text: None)
print("graded", json.dumps(graded))
"""


def run(config, folder, *stages, count):
  """Returns of each process the problems that it graded answers to."""
  text = json.dumps(to_dict(config))
  outputs = processes.run(
    _STAGES, text, folder, *stages, processes=count, devices=2 // count,
    timeout=900,
  )  # fmt: skip
  return [json.loads(output.split("\ngraded ")[-1]) for output in outputs]


def sampled(folder):
  lines = (folder / "collect" / "trajectories.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  for row in rows:
    for turn in row.get("sampled", ()):
      turn.pop("logps", None)
  return rows


def evaluated(folder):
  """Returns results without what they took."""
  results = json.loads((folder / "results.json").read_text())
  results.pop("timings")
  for method in results["methods"]:
    method.pop("seconds")
  return results


@pytest.mark.slow
def test_two_processes_leave_the_files_of_one(tmp_path):
  evaluation = EvaluateConfig(
    problems=11, budgets=(1, 2), value_problems=4, value_samples=4,
    max_new_tokens=10, max_step_tokens=4, batch_size=16,
  )  # fmt: skip
  config = runs.tiny_run(evaluate=evaluation)
  one, two = tmp_path / "one", tmp_path / "two"
  run(config, one, "sft", count=1)
  shutil.copytree(one, two)
  [alone] = run(config, one, "collect", count=1)
  shares = run(config, two, "collect", count=2)
  check_shares(shares, alone)
  assert sampled(two) == sampled(one)
  assert 0 < np.mean([row["reward"] for row in sampled(one)]) < 1
  first, second = (
    json.loads((folder / "collect" / "record.json").read_text())
    for folder in (one, two)
  )
  for name in ("success", "kept", "blank", "truncated", "grading"):
    assert second[name] == first[name], name
  assert first["grading"] == {"graded": len(alone)}
  # The same weights for both: only what follows is to be compared.
  run(config, one, "train", count=1)
  shutil.rmtree(two)
  shutil.copytree(one, two)
  [alone] = run(config, one, "evaluate", count=1)
  shares = run(config, two, "evaluate", count=2)
  check_shares(shares, alone)
  assert evaluated(two) == evaluated(one)
  searches = {method["search"] for method in evaluated(two)["methods"]}
  assert {"greedy", "best_of_n", "beam"} <= searches


def check_shares(shares, alone):
  """Each answer was graded once, and about as many by each process."""
  assert sorted(shares[0] + shares[1]) == sorted(alone)
  assert set(shares[0]).isdisjoint(shares[1])
  assert abs(len(shares[0]) - len(shares[1])) <= len(alone) / 6
