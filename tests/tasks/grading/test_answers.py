"""Cutting out final answers and reading plain numbers."""

from fractions import Fraction

import pytest

from oreo_jax.tasks.grading.answers import (
  drop_idle_blanks,
  extract_answer,
  normalize_answer,
  spell_for_algebra,
)
from oreo_jax.tasks.grading.compare import (
  compare_plainly,
  plain_number,
  vote_key,
)

EXTRACTED = [
  ("She has 3.\n#### 18", "18"),
  ("#### 1\n#### 2\n", "2"),
  ("####18", "18"),
  ("####  1,234 \nand more", "1,234"),
  ("x\nA: 18", "18"),
  ("A: 18", "18"),
  ("A: 18\n\nQ: again?\nA: 19", "19"),
  ("An A: 18 within a line", None),
  (r"so \boxed{18}.", "18"),
  (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
  (r"\boxed{3}, no, \boxed{4}", "4"),
  (r"\boxed{\boxed{4}}", "4"),
  (r"\boxed {4}", "4"),
  (r"$\boxed 4$ apples", "4"),
  (r"\fbox{4}", "4"),
  (r"\boxed{\{1,2\}}", r"\{1,2\}"),
  (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
  (r"\boxed{a} then #### b", "b"),
  (r"#### b then \boxed{a}", "a"),
  (r"#### \boxed{5}", "5"),
  (r"A: \boxed{5}", "5"),
  ("\\boxed{1,\n2}", "1,\n2"),
  (r"\boxed{5", None),
  (r"\boxed{3} and \boxed{5", None),
  (r"\boxed{}", None),
  (r"\boxedminus{3}", None),
  (r"\boxed{4} \boxedminus{3}", "4"),
  ("####", None),
  ("####   \n18", None),
  ("The answer is 18.", None),
  ("", None),
]


@pytest.mark.parametrize("response, answer", EXTRACTED)
def test_extract(response, answer):
  assert extract_answer(response) == answer


def test_only_the_wanted_markers_count():
  response = "\\boxed{1}\n#### 2\nA: 3"
  assert extract_answer(response, ("boxed",)) == "1"
  assert extract_answer(response, ("####",)) == "2"
  assert extract_answer(response, ("boxed", "####")) == "2"
  assert extract_answer(response) == "3"


def test_a_long_answer_is_cut_one_past_the_cap():
  assert len(extract_answer("#### " + "1" * 100_000)) == 1001
  assert (
    len(extract_answer("\\boxed{" + "1" * 2000 + "}", max_chars=500)) == 501
  )
  assert len(extract_answer("\\boxed{" + "1" * 100_000)) == 1001


NORMALIZED = [
  ("$18$", "18"),
  (r"\$18.00", "18.00"),
  ("18.", "18"),
  (r"\(18\)", "18"),
  (r"\left( 3, \dfrac{1}{2} \right)", r"( 3, \frac{1}{2} )"),
  (r"\text{Evelyn}", "Evelyn"),
  (r"\text{Evelyn.}", "Evelyn"),
  (r"12\,345", "12 345"),
  ("1{,}000", "1,000"),
  ("−3", "-3"),
  ("90°", r"90^\circ"),
  (r"\varnothing", r"\emptyset"),
  (
    r"\begin{pmatrix}1\\(2)\end{pmatrix}",
    r"\begin{pmatrix}1\\(2)\end{pmatrix}",
  ),
  (r"\leftarrow", r"\leftarrow"),
  ("10 A.M.", "10 am"),
  (r"10\text{ p.m.}", "10 pm"),
  ("10PM", "10pm"),
  ("3 sin x", r"3 \sin x"),
  ("log_2 8", r"\log_2 8"),
  ("5 A m", "5 A m"),
  ("sin(x)+cos 30", r"\sin(x)+\cos 30"),
  (r"2\mathrm{sin}x", r"2\sin x"),
  (r"\sin x", r"\sin x"),
  ("sine wave", "sine wave"),
  ("5 sec", "5 sec"),
]


@pytest.mark.parametrize("answer, normalized", NORMALIZED)
def test_normalize(answer, normalized):
  assert normalize_answer(answer) == normalized


NUMBERS = [
  ("18", 18),
  ("-18", -18),
  ("- 18", -18),
  ("+18", 18),
  ("007", 7),
  ("1,234,567", 1234567),
  ("1,234.5", Fraction(2469, 2)),
  ("1,2345", None),
  ("0.25", Fraction(1, 4)),
  (".25", Fraction(1, 4)),
  ("5.", 5),
  ("6.02e3", 6020),
  ("1e-3", Fraction(1, 1000)),
  (r"0.\overline{3}", Fraction(1, 3)),
  (r"0.1\overline{6}", Fraction(1, 6)),
  ("3/4", Fraction(3, 4)),
  ("-3 / 4", Fraction(-3, 4)),
  ("1 1/2", Fraction(3, 2)),
  (r"1\frac{1}{2}", Fraction(3, 2)),
  (r"-1 \frac{1}{2}", Fraction(-3, 2)),
  (r"\frac{1}{2}", Fraction(1, 2)),
  (r"\frac12", Fraction(1, 2)),
  (r"\frac{1}{0}", None),
  ("1/0", None),
  ("18 dollars", 18),
  ("18 square feet", 18),
  (r"18 \text{ cm}^2", 18),
  (r"18\text{ m}", 18),
  (r"18 \mathrm{cm}", 18),
  ("50%", 50),
  (r"50\%", 50),
  ("50 percent", 50),
  ("5 million", None),
  (r"5 \text{ or } 6", None),
  ("5 and 6", None),
  ("5 pi", None),
  ("5x", None),
  ("5 x", None),
  ("1,2", None),
  ("3:2", None),
  ("-", None),
  (".", None),
  ("", None),
  ("x", None),
  ("1e999", None),
  ("12 345", 12345),
  ("1 2", None),
  ("1 23", None),
  ("1234 567", None),
  ("10 am", 10),
  ("2 sin x", None),
  ("2 arctan x", None),
]


@pytest.mark.parametrize("text, value", NUMBERS)
def test_plain_number(text, value):
  number = plain_number(text)
  assert (number.value if number else None) == value


@pytest.mark.parametrize(
  "reference, answer, equal",
  [
    ("18", "18.0", True),
    ("18", "19", False),
    ("1", "1 1/2", False),
    ("1/3", "0.333333", True),
    ("1/3", "0.33", False),
    ("0.333333", "0.3333333", True),
    ("123456789012345678", "123456789012345679", False),
    ("50%", "0.5", True),
    ("0.5", "50%", True),
    ("50%", "5", False),
    (r"0.\overline{3}", "0", False),
    ("north", "South", False),
    ("north east", "North  East", True),
    ("11_2", "11_{2}", True),
    ("11_2", "11_3", False),
    ("x+1", "1+x", None),
    ("18", "x", None),
    ("1 1/2", "11/2", False),
    ("1 1/2", "1 1 / 2", True),
    ("1 2", "1  2", None),
    ("12", "1 2", None),
    ("x + 1", "x+1", True),
    ("12 345", "12,345", True),
    ("10 am", "10 pm", False),
    ("10:30 am", "10:30 pm", False),
    ("10 am", "10", True),
    ("2 sin x", "2", None),
    ("4 units east", "4 units west", False),
    ("10 am to 1 pm", "10 am to 1 am", False),
    (r"30^\circ\text{ north}", r"30^\circ\text{ south}", False),
    ("am+pm", "ma+pm", None),
  ],
)
def test_compare_plainly(reference, answer, equal):
  assert compare_plainly(reference, answer) is equal


@pytest.mark.parametrize(
  "text, expected",
  [
    ("x + 1", "x+1"),
    ("1 1 / 2", "1 1/2"),
    ("1 2", "1 2"),
    ("12 345", "12345"),
    ("1 234 567 and 1", "1234567and1"),
    ("1 2345", "1 2345"),
    ("5 123 45", "5 123 45"),
  ],
)
def test_idle_blanks(text, expected):
  assert drop_idle_blanks(text) == expected


@pytest.mark.parametrize(
  "text, expected",
  [
    ("1 1/2", "(1+1/2)"),
    ("x = -1 1/2", "x = -(1+1/2)"),
    ("0.5 1/2", "0.5, 1/2"),
    ("1 2 3", "1, 2, 3"),
    ("12 345 x", "12345 x"),
    (r"\log_2 8", r"\log_2 8"),
    (r"\frac 1 2 + 3 4", r"\frac 1 2 + 3, 4"),
    ("2^1 3", "2^1 3"),
    ("x + 1", "x + 1"),
  ],
)
def test_spelling_for_algebra(text, expected):
  assert spell_for_algebra(text) == expected


def test_votes_keep_apart_what_differs():
  groups = [
    ["12", "$12.0$", "12 eggs"],
    ["1 2"],
    ["1 1/2", "3/2", "1.5"],
    ["11/2", "5.5"],
    ["10 am", "10 a.m.", r"10\text{ AM}"],
    ["10 pm"],
    ["x + 1", "x+1"],
  ]
  keys = [{vote_key(answer) for answer in group} for group in groups]
  assert all(len(key) == 1 for key in keys)
  assert len(set().union(*keys)) == len(groups)
