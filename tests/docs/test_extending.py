"""The examples of docs/extending.md run."""

import pathlib
import re

import jax
import pytest

from oreo_jax.models.hf import families

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"
SECTIONS = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
TITLES = [section.split("\n")[0] for section in SECTIONS[1:]]


@pytest.fixture(autouse=True)
def _leave_no_family_behind():
  known = dict(families.FAMILIES)
  yield
  families.FAMILIES.clear()
  families.FAMILIES.update(known)


def blocks(section):
  return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_page_shows_how_to_add_each_kind_of_thing():
  assert TITLES == [
    "An objective",
    "A task",
    "An environment",
    "A search",
    "A model family",
  ]


@pytest.mark.parametrize("title", TITLES)
def test_example_runs(title):
  section = SECTIONS[1 + TITLES.index(title)]
  examples = blocks(section)
  assert examples
  source = "".join(blocks(SECTIONS[0]) + examples)
  assert "assert" in "".join(examples)
  # Readers run it without the strict dtype promotion of the tests.
  with jax.numpy_dtype_promotion("standard"):
    exec(compile(source, str(PAGE), "exec"), {"__name__": "docs"})
