"""Collecting: the same answers whether or not it was killed on the way."""

import dataclasses

import numpy as np
import pytest
from oracles import tiny

from oreo_jax import data
from oreo_jax.config import DataConfig
from oreo_jax.rollout import Codec, collect_answers
from oreo_jax.settings import ConfigError
from oreo_jax.tasks import Problem

PROBLEMS = [Problem(f"p{i}", f"{i} plus {i * i} =") for i in range(7)]
SAMPLES = 3


class Task:
  """Finds answers of an even number of characters right."""

  def grade(self, problems, responses):
    return np.array([1.0 - len(text) % 2 for text in responses], np.float32)

  def grading_report(self):
    return {}


@pytest.fixture(scope="module")
def setup():
  tokenizer = data.make_tokenizer("byte")
  config = dataclasses.replace(tiny.MODEL, vocab_size=len(tokenizer))
  codec = Codec.make(tokenizer, DataConfig(), len(tokenizer))
  # A letter in ten ends an answer, so that lengths differ.
  codec = dataclasses.replace(codec, end_ids=(*codec.end_ids, *range(60, 86)))
  return tiny.draw_params(config=config), codec, config


def collect(setup, folder, *, task=None, **options):
  policy, codec, config = setup
  options = {"num_samples": SAMPLES, "slots": 4, "answers_a_shard": 5} | options
  return collect_answers(
    policy,
    PROBLEMS,
    task or Task(),
    codec,
    config,
    folder,
    seed=1,
    max_new_tokens=12,
    **options,
  )


@pytest.fixture(scope="module")
def whole(setup, tmp_path_factory):
  return collect(setup, tmp_path_factory.mktemp("whole"))


def rows(collected):
  return [
    (t.id, t.reward, list(t.sampled[0].tokens)) for t in collected.trajectories
  ]


def test_shards_hold_every_answer_once(setup, tmp_path, whole):
  got = collect(setup, tmp_path / "answers")
  shards = sorted((tmp_path / "answers").iterdir())
  assert [shard.name for shard in shards] == [f"{n:05}.jsonl" for n in range(5)]
  written = [t for shard in shards for t in data.load_trajectories(shard)]
  assert sorted(t.id for t in written) == sorted(t.id for t in got.trajectories)
  # In the order of problems and samples, whatever ended first.
  assert [t.id for t in got.trajectories] == [
    f"{problem.id}/{i}" for problem in PROBLEMS for i in range(SAMPLES)
  ]
  lengths = {len(tokens) for _, _, tokens in rows(got)}
  assert len(lengths) > 4
  assert {t.reward for t in got.trajectories} == {0.0, 1.0}
  assert rows(got) == rows(whole)


@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_run_that_was_killed_goes_on(setup, tmp_path, whole, killed_at):
  class Killed(Task):
    calls = 0

    def grade(self, problems, responses):
      self.calls += 1
      if self.calls > killed_at:
        raise KeyboardInterrupt
      return super().grade(problems, responses)

  with pytest.raises(KeyboardInterrupt):
    collect(setup, tmp_path, task=Killed())
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  assert len(before) == killed_at
  # It goes on with another number of slots, and samples only what is missing.
  rest = collect(setup, tmp_path, slots=3)
  assert rows(rest) == rows(whole)
  assert rest.usage.tokens == sum(
    len(tokens) for _, _, tokens in rows(whole)
  ) - sum(
    len(t.sampled[0].tokens)
    for name in before
    for t in data.load_trajectories(tmp_path / name)
  )
  assert all((tmp_path / n).read_bytes() == b for n, b in before.items())
  # And once all is there, nothing is sampled.
  assert rows(collect(setup, tmp_path)) == rows(whole)
  assert collect(setup, tmp_path).usage.tokens == 0


def test_answers_of_another_run_are_refused(setup, tmp_path):
  collect(setup, tmp_path)
  with pytest.raises(ConfigError, match=r"0000\d.jsonl.*got 'p\d/2'; remove"):
    collect(setup, tmp_path, num_samples=2)


def test_ids_must_differ(setup, tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), "PROBLEMS", [Problem("a", "x")] * 2)
  with pytest.raises(ConfigError, match="attempts with . ids"):
    collect(setup, tmp_path)


def test_a_sample_does_not_depend_on_what_was_skipped(setup, tmp_path, whole):
  policy, codec, config = setup
  part = collect_answers(
    policy,
    PROBLEMS[2:],
    Task(),
    codec,
    config,
    tmp_path,
    seed=1,
    num_samples=1,
    max_new_tokens=12,
    slots=4,
    first_number=2,
  )
  names = {f"p{i}/0" for i in range(2, 7)}
  assert rows(part) == [row for row in rows(whole) if row[0] in names]
