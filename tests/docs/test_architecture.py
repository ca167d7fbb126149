"""docs/architecture.md says what is true of the tree."""

import importlib
import pathlib
import re

import pytest
from test_layers import LAYERS

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "oreo_jax"
PAGES = ("docs/architecture.md", "docs/extending.md", "CONTRIBUTING.md")


def prose(page):
  """The page without its fenced blocks."""
  text = (ROOT / page).read_text(encoding="utf-8")
  return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def quoted(page):
  return re.findall(r"`([^`\n]+)`", prose(page))


def files_named(page):
  """Names of Python files, such as `train/step.py`."""
  return [name for name in quoted(page) if re.fullmatch(r"[\w/.]+\.py", name)]


def members_named(page):
  """Dotted names whose first word is a room, such as `train.loop.fit`."""
  names = [q for q in quoted(page) if re.fullmatch(r"\w+(\.\w+)+", q)]
  return [
    name
    for name in names
    if name.split(".")[0] in LAYERS
    and name.rsplit(".", 1)[1] not in ("py", "json", "jsonl")
  ]


def file_exists(name):
  return (PACKAGE / name).is_file() or (ROOT / name).is_file()


def resolve(name):
  """Returns what a dotted name stands for; raises where there is nothing."""
  words = ["oreo_jax", *name.split(".")]
  for count in range(len(words), 0, -1):
    try:
      thing = importlib.import_module(".".join(words[:count]))
    except ModuleNotFoundError as error:
      if not (error.name or "").startswith("oreo_jax"):
        raise
      continue
    for word in words[count:]:
      thing = getattr(thing, word)
    return thing
  raise AttributeError(name)


def floors_of_the_page():
  """The first table of the page: room -> floor."""
  rows = re.findall(
    r"^\| (\d+) \| (.*?) \|", prose("docs/architecture.md"), re.MULTILINE
  )
  return {
    room: int(floor)
    for floor, rooms in rows
    for room in re.findall(r"`(\w+)`", rooms)
  }


def test_the_table_of_floors_is_the_one_that_is_tested():
  assert floors_of_the_page() == LAYERS


@pytest.mark.parametrize("page", PAGES)
def test_the_files_a_page_names_exist(page):
  missing = [name for name in files_named(page) if not file_exists(name)]
  assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_in_the_package_exists(page):
  missing = []
  for name in members_named(page):
    try:
      resolve(name)
    except AttributeError:
      missing.append(name)
  assert missing == []


def test_the_page_names_enough_for_the_checks_to_mean_something():
  assert len(files_named("docs/architecture.md")) >= 10
  assert len(members_named("docs/architecture.md")) >= 50


@pytest.mark.parametrize("name", ["train.stepp", "train.step.train_stepp"])
def test_a_wrong_name_is_noticed(name):
  with pytest.raises(AttributeError):
    resolve(name)
  assert not file_exists("train/stepp.py")


def test_the_readme_names_what_exists():
  section = (ROOT / "README.md").read_text(encoding="utf-8")
  section = section.split("## Where things are")[1]
  paths = re.findall(r"`((?:[\w.]+/)+[\w.]*)`|\]\((docs/[\w.]+)\)", section)
  names = [a or b for a, b in paths]
  assert len(names) >= 10
  for name in names:
    assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


def test_the_readme_has_a_row_for_every_folder_of_the_package():
  section = (ROOT / "README.md").read_text(encoding="utf-8")
  rows = re.findall(r"^\| `oreo_jax/(\w+)/` \|", section, re.MULTILINE)
  folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
  assert sorted(rows) == sorted(folders)


def test_the_readme_lists_every_command():
  from oreo_jax.stages import STAGES

  text = (ROOT / "README.md").read_text(encoding="utf-8")
  commands = text.split("## Commands")[1].split("## Where things are")[0]
  assert re.findall(r"^\| `oreo (\w+)`", commands, re.MULTILINE) == list(STAGES)
