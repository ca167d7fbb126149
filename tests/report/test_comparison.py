"""Tables and page of a comparison of methods."""

import html.parser
import itertools

import pytest

from oreo_jax import report
from oreo_jax.analysis.results import Comparison, checked


def cell(lr, accuracy, diverged=False):
  return {"lr": lr, "accuracy": accuracy, "diverged": diverged}


RESULTS = {
  "task": "maze",
  "seconds": 3300.0,
  "split": "test",
  "seeds": [0, 1],
  "problems": 1000,
  "validation_problems": 500,
  "chosen": {"dpo": 1e-4, "oreo_token": 1e-3, "oreo_step": 1e-3},
  "searched": {"dpo": [cell(1e-4, 0.55), cell(1e-3, 0.0, True)]},
  "methods": [
    {
      "method": name,
      "label": label,
      "colour": "blue" if "OREO" in label else "grey",
      **({"objective": "oreo", "granularity": name[5:]} if "_" in name else {}),
      "lr": None if name == "sft" else 1e-3,
      "accuracies": [mean - 0.01, mean + 0.01],
      "mean": mean,
      "std": 0.014,
      "against_sft": None
      if name == "sft"
      else {
        "difference": mean - 0.5,
        "interval": [mean - 0.53, mean - 0.47],
        "p_values": [1e-9, 0.0213],
        "only_method": [1, 1],
        "only_sft": [0, 0],
      },
      "seconds": 61.2,
    }
    for name, label, mean in (
      ("sft", "SFT", 0.5),
      ("rejection", "Rejection sampling", 0.6),
      ("dpo", "DPO", 0.55),
      ("oreo_token", "OREO, token", 0.7),
      ("oreo_step", "OREO, step", 0.69),
    )
  ],
  "rounds": {
    name: {
      str(seed): [
        {
          "round": number,
          "accuracy": accuracy,
          "interval": [accuracy - 0.03, accuracy + 0.03],
          "correct": round(1000 * accuracy),
          "total": 1000,
        }
        for number, accuracy in enumerate(accuracies)
      ]
      for seed in (0, 1)
    }
    for name, accuracies in (
      ("oreo_token", (0.5, 0.7, 0.8)),
      ("rejection", (0.5, 0.6, 0.61)),
    )
  },
}


@pytest.mark.parametrize(
  ("rates", "chosen", "remark"),
  [
    ((1e-4, 1e-3, 1e-2), 1e-3, ""),
    ((1e-4, 1e-3, 1e-2), 1e-4, "best at the edge of the grid"),
    ((1e-4, 1e-3, 1e-2), 1e-2, "best at the edge of the grid"),
    # A grid of two has nothing but edges, one of one was not searched: both
    # went without a remark.
    ((1e-4, 1e-3), 1e-3, "best at the edge of a grid of two"),
    ((), 1e-3, "one rate, not searched"),
  ],
)
def test_a_rate_at_the_edge_of_its_grid_is_named(rates, chosen, remark):
  tried = {"dpo": [cell(lr, 0.5) for lr in rates]} if rates else {}
  results = RESULTS | {"searched": tried, "chosen": {"dpo": chosen}}
  lines = report.format_comparison(results).splitlines()
  row = lines[lines.index(next(x for x in lines if "lr: solved" in x)) + 2]
  assert row.startswith("DPO") and row.endswith(remark or "%")


def with_contrasts():
  """Results as they are written today: differences over seeds and problems."""
  methods = []
  for row in RESULTS["methods"]:
    against = row["against_sft"]
    if against:
      against = against | {"p_value": 0.012, "seeds": 2}
    methods.append(row | {"against_sft": against})
  names = [row["method"] for row in methods]
  pairs = [
    {
      "method": method,
      "other": other,
      "difference": 0.1,
      "interval": [0.05, 0.15],
      "p_value": 0.01,
      "seeds": 2,
      "p_holm": 0.06 if other == "sft" else 0.03,
    }
    for other, method in itertools.combinations(names, 2)
  ]
  return RESULTS | {"methods": methods, "contrasts": pairs}


def test_methods_are_shown_against_each_other(tmp_path):
  results = with_contrasts()
  lines = report.format_comparison(results).splitlines()
  first = next(i for i, x in enumerate(lines) if x.startswith("method less"))
  assert [line.split() for line in lines[first + 2 : first + 7]] == [
    ["1", "SFT"],
    ["2", "Rejection", "sampling", "+10.0*"],
    ["3", "DPO", "+10.0*", "+10.0**"],
    ["4", "OREO,", "token", "+10.0*", "+10.0**", "+10.0**"],
    ["5", "OREO,", "step", "+10.0*", "+10.0**", "+10.0**", "+10.0**"],
  ]
  page = report.write_comparison(tmp_path, results).read_text(encoding="utf-8")
  assert "Methods against each other" in page
  assert page.count("+10.0**") == 6


@pytest.mark.parametrize(
  ("results", "said"),
  [
    (RESULTS, "did not count other seeds"),
    (with_contrasts(), "other seeds than these 2 would have trained"),
    (with_contrasts() | {"seeds": [0]}, "With one seed neither it nor p"),
  ],
)
def test_the_reader_is_told_what_the_interval_is_of(tmp_path, results, said):
  text = report.format_comparison(results)
  assert said in " ".join(text.split())
  page = report.write_comparison(tmp_path, results).read_text(encoding="utf-8")
  assert said in page


def test_the_table_as_text():
  lines = report.format_comparison(RESULTS).splitlines()
  row = next(line for line in lines if line.startswith("DPO"))
  assert row.split() == (
    "DPO 0.001 55.0% 1.4 54.0 56.0 +5.0 +2.0 to +8.0 0.0213 61".split()
  )
  assert any("0.0001: 55.0%*  0.001: diverged" in line for line in lines)
  text = " ".join(lines)
  assert "The comparison took 55 minutes in all." in text
  assert "1,000 held-out problems of the test split; sd is" in text
  assert any("500 validation problems, seed 0" in line for line in lines)
  assert "rounds of Rejection sampling, seed 1" in lines


class Tags(html.parser.HTMLParser):
  """Counts elements and checks that they close in order."""

  VOID = {"meta", "br", "hr", "img", "link"}

  def __init__(self):
    super().__init__()
    self.open, self.count = [], {}

  def handle_starttag(self, tag, attrs):
    self.count[tag] = self.count.get(tag, 0) + 1
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.count[tag] = self.count.get(tag, 0) + 1

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_page(tmp_path):
  path = report.write_comparison(tmp_path, RESULTS)
  page = path.read_text(encoding="utf-8")
  tags = Tags()
  tags.feed(page)
  assert not tags.open
  assert tags.count["svg"] == 3
  assert "http" not in page.replace("http-equiv", "")
  # Without rounds and with one granularity, the methods alone.
  methods = [m for m in RESULTS["methods"] if m["method"] != "oreo_step"]
  nothing = {"rounds": {}, "searched": {}, "chosen": {}}
  less = RESULTS | nothing | {"methods": methods}
  page = report.write_comparison(tmp_path, less).read_text(encoding="utf-8")
  assert page.count("<svg") == 1 and "What was searched" not in page


def test_old_results_without_labels_are_shown_by_their_keys(tmp_path):
  methods = [
    {k: v for k, v in row.items() if k not in ("label", "colour")}
    for row in RESULTS["methods"]
  ]
  old = RESULTS | {"methods": methods}
  assert "oreo_token" in report.format_comparison(old)
  page = report.write_comparison(tmp_path, old).read_text(encoding="utf-8")
  assert "oreo_token" in page


def test_what_compare_writes_is_of_the_schema():
  for results in (RESULTS, with_contrasts()):
    assert checked(results, Comparison) == results
