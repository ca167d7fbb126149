"""The Python of docs/decoding.md runs, and what the page names is there."""

import pathlib
import re

import jax
import pytest
from oracles import tiny

from oreo_jax import data, models

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "decoding.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A random policy and a value network, as `oreo export` leaves them."""
  home = tmp_path_factory.mktemp("export")
  tokenizer = data.make_tokenizer("byte")
  config = models.preset("tiny-llama", vocab_size=len(tokenizer))
  for head, name in (("lm", "folder"), ("value", "value_folder")):
    params = tiny.draw_params(config, head=head)
    models.save_hf(
      home / name, params, config, tokenizer=tokenizer, eos_ids=(0,)
    )
  return {name: str(home / name) for name in ("folder", "value_folder")}


@pytest.mark.slow
def test_blocks_run_one_after_the_other(folders, capsys):
  names = {"__name__": "docs", **folders}
  with jax.numpy_dtype_promotion("standard"):  # as a reader has it
    for block in BLOCKS:
      exec(compile(block, "docs/decoding.md", "exec"), names)
  assert len(names["along"]) >= 2
  assert names["best"].score is not None
  assert capsys.readouterr().out.count("\n") > 4


def test_tests_that_the_page_names_are_there():
  named = re.findall(r"`(tests/[\w/.]+)`", PAGE)
  assert named and all((ROOT / name).is_file() for name in named)
