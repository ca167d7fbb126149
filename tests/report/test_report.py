import html.parser
import json
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from oreo_jax import report
from oreo_jax.analysis import statistics
from oreo_jax.analysis.auc import compare_scores
from oreo_jax.metrics import MetricsWriter
from oreo_jax.report import plots

LOOKS = {
  "sft": ("SFT", "grey"),
  "rejection": ("rejection sampling", "orange"),
  "dqo": ("DQO", "green"),
  "oreo": ("OREO", "blue"),
}


def method(name, policy, search, budget, accuracy, tokens=20.0, total=1000):
  correct = round(accuracy * total)
  label, colour = LOOKS[policy]
  return {
    "name": name,
    "policy": policy,
    "label": label,
    "colour": colour,
    "search": search,
    "budget": budget,
    "accuracy": correct / total,
    "interval": list(statistics.wilson_interval(correct, total)),
    "correct": correct,
    "total": total,
    "tokens_per_problem": tokens * budget,
    "seconds": 0.4 * budget + 0.2,
  }


def make_methods():
  methods = [
    method("SFT greedy", "sft", "greedy", 1, 0.541),
    method("SFT sample", "sft", "sample", 1, 0.472),
    method("Rejection sampling greedy", "rejection", "greedy", 1, 0.733),
    method("Rejection sampling sample", "rejection", "sample", 1, 0.612),
    method("OREO greedy", "oreo", "greedy", 1, 0.853),
    method("OREO sample", "oreo", "sample", 1, 0.812),
  ]
  for budget, vote, weighted, best in (
    (4, 0.860, 0.871, 0.885),
    (16, 0.874, 0.889, 0.921),
    (49, 0.879, 0.897, 0.937),
  ):
    methods += [
      method(f"OREO vote N={budget}", "oreo", "vote", budget, vote),
      method(
        f"OREO weighted vote N={budget}",
        "oreo",
        "weighted_vote",
        budget,
        weighted,
      ),
      method(f"OREO best of N={budget}", "oreo", "best_of_n", budget, best),
    ]
  for beams, accuracy in ((2, 0.918), (4, 0.951), (7, 0.968)):
    methods.append(
      method(f"OREO + beam B={beams}", "oreo", "beam", beams**2, accuracy)
    )
  return methods


def make_values():
  rng = np.random.default_rng(0)
  edges = np.linspace(0, 1, 21)
  tenths = np.arange(1, 11) / 10
  auc = 0.55 + 0.39 * tenths**0.8
  predicted = np.linspace(0.05, 0.95, 10)
  histogram = {"edges": edges.tolist(), "correct": [], "wrong": []}
  means = ([], [])
  for tenth in tenths:
    right = np.clip(rng.beta(3 + 8 * tenth, 2, 3000), 0, 1)
    wrong = np.clip(rng.beta(3, 2 + 7 * tenth, 2000), 0, 1)
    histogram["correct"].append(np.histogram(right, edges)[0].tolist())
    histogram["wrong"].append(np.histogram(wrong, edges)[0].tolist())
    means[0].append(float(right.mean()))
    means[1].append(float(wrong.mean()))
  return {
    "tenths": tenths.tolist(),
    "within_problem_auc": auc.tolist(),
    "within_problem_auc_interval": np.stack(
      [auc - 0.012, auc + 0.012], axis=1
    ).tolist(),
    "pooled_auc": (auc + 0.03 * (1 - tenths)).tolist(),
    "mean_correct": means[0],
    "mean_wrong": means[1],
    "histogram": histogram,
    "calibration": {
      "predicted": predicted.tolist(),
      "observed": (predicted + 0.05 * np.sin(6 * predicted)).tolist(),
      "count": [400, 210, 160, 120, 150, 180, 260, 420, 900, 2200],
    },
  }


def make_example():
  moves = ["a1 > a2", "a2 > b2", "b2 > c2", "c2 > c3", "c3 > d3", "d3 > e3"]
  values = [0.62, 0.66, 0.41, 0.78, 0.93, 0.99]
  steps = []
  before = 0.6
  for move, value in zip(moves, values, strict=True):
    steps.append(
      {
        "text": move + "\n",
        "value": value,
        "explicit_advantage": value - before,
        "implicit_advantage": 0.7 * (value - before),
      }
    )
    before = value
  prompt = "start a1\ngoal e3\nwalls b1 <c1> d2\n"
  return {"prompt": prompt, "steps": steps, "reward": 1.0}


def make_results():
  return {
    "task": "maze",
    "seed": 0,
    "problems": 1000,
    "steps_per_answer": 6.2,
    "methods": make_methods(),
    "values": make_values(),
    "example": make_example(),
    "timings": {
      "install": 74.0,
      "sft": 96.2,
      "collect": 31.5,
      "rejection": 58.1,
      "oreo": 192.4,
      "evaluate": 88.3,
    },
  }


def write_run(workdir, results=None):
  """A work directory as the stages leave it."""
  rng = np.random.default_rng(1)
  for stage, names in (
    ("sft", ("loss", "grad_norm/policy", "lr/policy")),
    ("oreo", ("value/loss", "policy/loss", "policy/kl", "grad_norm/policy")),
  ):
    with MetricsWriter(workdir / stage, tensorboard=False) as writer:
      for step in range(10, 810, 10):
        writer.write(
          step,
          {
            name: math.exp(-step / (200 + 90 * i)) + 0.08 * rng.random()
            for i, name in enumerate(names)
          },
        )
  (workdir / "config.py").write_text("VALUES = {'seed': 0, 'x': '<&>'}\n")
  text = json.dumps(make_results() if results is None else results)
  (workdir / "results.json").write_text(text)


class Outline(html.parser.HTMLParser):
  """Tags, identifiers and links of a page; unbalanced tags are an error."""

  VOID = {"meta", "br", "path", "use", "rect", "line", "image", "stop", "link"}

  def __init__(self, page):
    super().__init__()
    self.open, self.tags, self.ids, self.links = [], [], [], []
    self.headings, self.text = [], ""
    self.feed(page)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    for name, target in attributes:
      if name == "id":
        self.ids.append(target)
      if name in ("href", "src", "xlink:href"):
        self.links.append(target)
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    if tag not in self.VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data
    if self.open and self.open[-1] == "h2":
      self.headings.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  write_run(workdir)
  path = report.write_report(workdir)
  assert path == workdir / "report.html"
  assert not list(workdir.glob("*.tmp"))
  return path.read_text()


def test_report_of_a_whole_run(page):
  outline = Outline(page)
  assert outline.headings == [
    "Accuracy",
    "Accuracy against compute",
    "Does the value know?",
    "One answer, step by step",
    "Training",
    "Time by stage",
    "Configuration",
  ]
  assert "Not in this run" not in page
  # 1 accuracy, 2 budgets, 3 + 3 values, 1 example, 2 + 4 curves without lr.
  assert outline.tags.count("svg") == 16
  for row in make_methods():
    assert row["name"] in outline.text
  assert "85.3%" in outline.text
  assert "83.0 to 87.4" in outline.text


def test_report_needs_no_network(page):
  outline = Outline(page)
  assert all(link.startswith("#") for link in outline.links)
  assert not {"link", "script", "iframe", "img"} & set(outline.tags)
  assert "http" not in page
  assert "@import" not in page
  # References inside a page only work if identifiers are unique.
  assert len(outline.ids) == len(set(outline.ids))
  assert {link[1:] for link in outline.links} <= set(outline.ids)


def test_report_escapes_what_it_shows(page):
  assert "walls b1 &lt;c1&gt; d2" in page
  assert "&lt;&amp;&gt;" in page


@pytest.mark.parametrize(
  ("section", "said"),
  [
    ("example", "search at several budgets, training curves, the value, time"),
    ("timings", "curves, the value, a worked example, the configuration"),
  ],
)
def test_sections_come_one_by_one(section, said):
  results = make_results()
  results = {
    **{key: results[key] for key in ("task", "seed", "problems")},
    "methods": results["methods"][:1],
    section: results[section],
  }
  page = report.render(results, stages={}, config=None)
  assert len(Outline(page).headings) == 2
  assert said in page


def test_example_of_an_answer_that_ended_at_once():
  results = make_results()
  results["example"]["steps"] = []
  page = report.render(results, stages={}, config=None)
  assert "The answer ended before its first token." in page
  assert "One answer, step by step" in Outline(page).headings


def test_meters_reach_over_the_values_of_the_example():
  results = make_results()
  for step, value in zip(results["example"]["steps"], (-4, 6), strict=False):
    step["value"] = value
  page = report.render(results, stages={}, config=None)
  shares = re.findall(r"--share:([\d.]+)%", page)
  # From -4 to 6; values outside [0, 1] all had an empty or a full meter.
  assert shares[:2] == ["0.0", "100.0"]
  assert shares[2] == f"{10 * (4 + 0.41):.1f}"


def test_report_of_the_least_run(tmp_path):
  results = {
    "task": "gsm8k",
    "seed": 3,
    "problems": 1,
    "methods": [method("SFT greedy", "sft", "greedy", 1, 0.0, total=1)],
  }
  (tmp_path / "results.json").write_text(json.dumps(results))
  page = report.write_report(tmp_path).read_text()
  assert Outline(page).headings == ["Accuracy"]
  assert "Decoding greedily, SFT solves 0.0% of 1 held-out problem." in page
  assert "search at several budgets, training curves" in page


@pytest.mark.parametrize("missing", [math.nan, None])
def test_figures_that_could_not_be_measured_are_dashes(missing):
  results = make_results()
  results["methods"] = results["methods"][:1]
  values = results["values"]
  for i in (0, -1):
    values["within_problem_auc"][i] = missing
    values["within_problem_auc_interval"][i] = [missing, missing]
  values["mean_wrong"][0] = missing
  text = Outline(report.render(results, stages={}, config=None)).text
  assert "\N{EN DASH} to \N{EN DASH}" in text
  assert "nan" not in text
  assert "None" not in text


def test_headline_says_what_was_measured():
  results = make_results()
  assert report.headline(results) == (
    "Decoding greedily, OREO solves 85.3% of 1,000 held-out problems; SFT "
    "54.1% and rejection sampling 73.3%. Searched step by step with its value "
    "at the largest budget (OREO + beam B=7), 96.8%."
  )


def test_headline_does_not_choose_by_the_figures_it_reports():
  # The best of the searches, 99.0%, was shown, and without OREO the best of all
  # methods: chosen on the problems that are reported.
  results = make_results()
  for row in results["methods"]:
    if row["name"] == "OREO + beam B=4":
      row["accuracy"] = 0.99
  assert "(OREO + beam B=7), 96.8%" in report.headline(results)
  page = report.render(results, stages={}, config=None)
  tiles = page[page.index('class="tiles"') : page.index("<main>")]
  assert "96.8%" in tiles and "99.0%" not in tiles
  results["methods"] = [
    method("SFT greedy", "sft", "greedy", 1, 0.7),
    method("DQO greedy", "dqo", "greedy", 1, 0.6),
    method("DQO, one sample", "dqo", "sample", 1, 0.9),
  ]
  assert report.headline(results) == (
    "Decoding greedily, DQO solves 60.0% of 1,000 held-out problems; SFT 70.0%."
  )
  # A baseline may stand last; what the run is about is written down.
  results["objective"] = "sft"
  assert report.headline(results).startswith("Decoding greedily, SFT solves 70")


def test_old_results_without_labels_are_shown_by_their_keys():
  results = make_results()
  for row in results["methods"]:
    del row["label"], row["colour"]
  text = report.headline(results)
  assert "oreo solves 85.3%" in text and "rejection 73.3%" in text
  assert Outline(report.render(results, stages={}, config=None)).headings


def test_table_for_the_terminal():
  results = make_results()
  results["methods"] = [
    method("SFT", "sft", "greedy", 1, 0.541),
    method("B=7", "oreo", "beam", 49, 0.968),
  ]
  assert report.format_table(results).splitlines() == [
    "method  solved  95% interval    correct  sequences  tokens  seconds",
    "-------------------------------------------------------------------",
    "SFT      54.1%  51.0 to 57.2  541/1,000          1      20      0.6",
    "B=7      96.8%  95.5 to 97.7  968/1,000         49     980     19.8",
    "",
    "Sequences and tokens are what the policy samples for one problem; seconds",
    "are for all problems.",
  ]


def test_table_and_headline_of_a_run_without_methods():
  rng = np.random.default_rng(0)
  problems = [str(i // 4) for i in range(80)]
  labels = rng.random(80) < 0.4
  scores = rng.normal(size=80) + labels
  results = {
    "task": "trajectories",
    "seed": 0,
    "problems": 20,
    "methods": [],
    "value_scores": compare_scores(
      {"value, last state": scores}, labels, problems, resamples=50
    ),
  }
  table = report.format_table(results)
  assert table.splitlines()[2].startswith("value, last state")
  assert "AUC within" in table and "Of 80 trajectories" in table
  assert "20 held-out problems" in report.headline(results)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "not found; `oreo evaluate"),
    ("{", "not JSON"),
    ('{"task": "maze", "seed": 0, "problems": 2}', "no 'methods'"),
    (
      '{"task": "m", "seed": 0, "problems": 2, "methods": [{"name": "x"}]}',
      r"methods\[0\] has no 'policy'",
    ),
    ('{"task": "m", "seed": 0, "problems": 2, "methods": []}', "no methods"),
  ],
)
def test_bad_results_are_one_clear_error(tmp_path, text, message):
  if text is not None:
    (tmp_path / "results.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    report.write_report(tmp_path)
  assert not (tmp_path / "report.html").exists()


def test_plots_are_xml_with_colours_of_the_page():
  svg = plots.curve("sft", "a<b", np.arange(5), np.array([1, np.nan, 3, 2, 1]))
  # Well formed once the one prefix that HTML takes as it is has a name.
  root = ET.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
  assert root.get("aria-label") == "sft: a<b against training step"
  assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
  assert "var(--blue)" in svg


def test_a_start_far_off_does_not_flatten_a_curve():
  steps = np.arange(100)
  usual = 1 + np.exp(-steps / 30)
  assert "off the scale" not in plots.curve("sft", "loss", steps, usual)
  far = np.where(steps < 5, 1e4, usual)
  assert "off the scale" in plots.curve("sft", "loss", steps, far)


def test_plots_of_extreme_numbers():
  one = plots.Point(1, 1.0, (0.99, 1.0))
  assert "<svg" in plots.budgets({"beam": [one]}, reference=None, x_label="x")
  assert "<svg" in plots.curve("sft", "flat", np.arange(2), np.zeros(2))
  assert "<svg" in plots.value_histogram("t", [0, 0.5, 1], [0, 0], [0, 3])
  shares = plots.calibration([-0.2, 1.3], [0, 1], [1, 1])
  assert "solved (observed)" in shares
  assert "mean reward (observed)" in plots.calibration(
    [-9.0, 8.0], [-10, 10], [1, 1]
  )
  assert "<svg" in plots.values_by_step([0.5], 0.0)
