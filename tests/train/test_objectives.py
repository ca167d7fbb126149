"""What each objective trains on, and the table of them."""

import numpy as np
import pytest

from oreo_jax import data
from oreo_jax.config import (
  CompareConfig,
  Config,
  ConfigError,
  DataConfig,
  MethodConfig,
  SftConfig,
  TrainConfig,
)
from oreo_jax.data import Trajectory, make_loader
from oreo_jax.report.style import COLOURS
from oreo_jax.train import METHODS, OBJECTIVES, get_objective

TOKENIZER = data.make_tokenizer("byte")


def tokenize(trajectories, **options):
  return data.tokenize_trajectories(
    trajectories, TOKENIZER, max_length=20, **options
  )


def skip_long(trajectories):
  return tokenize(trajectories, on_long="skip")


def trajectories(long_right=None, long_wrong=None):
  """A right and a wrong answer to each of four problems."""
  answers = []
  for problem in range(4):
    for reward, long in ((1.0, long_right), (0.0, long_wrong)):
      text = "x" * (50 if problem == long else 3) + f"{problem}{reward:.0f}"
      answers.append(Trajectory.from_text(f"p{problem}", text, reward))
  return answers


def text_of(sequence):
  return TOKENIZER.decode(sequence.tokens[sequence.action_mask])


def test_pairs_are_of_one_problem_the_right_one_first():
  pairs = OBJECTIVES["dpo"].sequences(trajectories(), tokenize, TrainConfig())
  assert len(pairs) == 4
  for chosen, rejected in pairs:
    assert chosen.problem == rejected.problem
    assert text_of(chosen)[4] == "1" and text_of(rejected)[4] == "0"


def test_a_dropped_trajectory_takes_its_pair_along():
  # One of either side is dropped: what is left must not close ranks.
  pairs = OBJECTIVES["dpo"].sequences(
    trajectories(long_right=1, long_wrong=2), skip_long, TrainConfig()
  )
  assert [chosen.problem for chosen, _ in pairs] == ["p0", "p3"]
  assert all(a.problem == b.problem for a, b in pairs)


def test_rejection_keeps_the_right_answers_and_oreo_all():
  sizes = {
    name: len(
      OBJECTIVES[name].sequences(trajectories(), tokenize, TrainConfig())
    )
    for name in ("rejection", "oreo", "kto", "dqo")
  }
  assert sizes == {"rejection": 4, "oreo": 8, "kto": 8, "dqo": 8}
  right = OBJECTIVES["rejection"].sequences(
    trajectories(), tokenize, TrainConfig()
  )
  np.testing.assert_array_equal([s.rewards.sum() for s in right], 1.0)


def dpo_config(**changes):
  return Config(
    data=DataConfig(row_length=16),
    train=TrainConfig(**{"objective": "dpo", "batch_size": 8, **changes}),
  )


def test_a_row_of_dpo_takes_two_answers_of_any_length():
  config = dpo_config()
  longest = config.data.row_length + 1
  long = [
    Trajectory.from_text("p", letter * (longest - 3), reward)
    for letter, reward in (("x", 1.0), ("y", 0.0))
  ]
  pairs = OBJECTIVES["dpo"].sequences(
    long,
    lambda chosen: data.tokenize_trajectories(
      chosen, TOKENIZER, max_length=longest
    ),
    config.train,
  )
  assert [len(side.tokens) for side in pairs[0]] == [longest] * 2
  with pytest.raises(ValueError, match="a row has 16"):
    make_loader(pairs, batch_size=8, row_length=config.data.row_length)
  fitted = OBJECTIVES["dpo"].fit_rows(config)
  loader = make_loader(
    pairs,
    batch_size=fitted.train.batch_size,
    row_length=fitted.data.row_length,
  )
  assert loader.num_sequences == 2
  assert loader.batch(0).segment_ids.max() == 2


@pytest.mark.parametrize(
  "batch_size, parts, fitted",
  [
    (8, 1, (4, 1)),
    (8, 4, (4, 4)),
    (8, 8, (4, 4)),
    (6, 2, (3, 1)),
    (1, 1, (1, 1)),
  ],
)
def test_a_batch_of_dpo_has_as_many_tokens(batch_size, parts, fitted):
  config = dpo_config(batch_size=batch_size, grad_accum=parts)
  config.validate()
  result = OBJECTIVES["dpo"].fit_rows(config)
  result.validate()
  assert (result.train.batch_size, result.train.grad_accum) == fitted
  assert result.data.row_length == 32
  # One answer alone may be no longer than before.
  assert result.data.max_length == 17
  # The config that was given is as it was.
  assert config == dpo_config(batch_size=batch_size, grad_accum=parts)


def test_rows_of_single_answers_stay_as_they_are():
  config = dpo_config()
  for name in set(OBJECTIVES) - {"dpo"}:
    assert OBJECTIVES[name].fit_rows(config) is config


def test_an_objective_reads_its_own_section():
  config = Config(sft=SftConfig(batch_size=3), train=TrainConfig(batch_size=5))
  sizes = {k: row.stage(config).batch_size for k, row in OBJECTIVES.items()}
  assert sizes.pop("sft") == 3
  assert set(sizes.values()) == {5}


def test_methods_are_rows_of_their_objective():
  for objective in OBJECTIVES.values():
    for method in objective.methods:
      assert method.objective == objective.name
      assert METHODS[method.name] is method
      assert method.colour in COLOURS
      # Nothing to compare without a policy of its own.
      assert objective.trains_policy
      # `oreo run` takes a rate that `oreo compare` would try.
      assert method.lr_scale in method.lr_scales
      # A section in which a user can change it.
      assert getattr(CompareConfig(), method.name) == MethodConfig()
  assert len({method.label for method in METHODS.values()}) == len(METHODS)


def test_a_section_of_the_comparison_changes_its_row_and_no_other():
  config = Config()
  assert METHODS["dpo"].given(config) == METHODS["dpo"]
  config.compare.dpo = MethodConfig(
    beta=0.2, alpha=0.0, epochs=2.0, lr_scale=0.5, lr_scales=(0.5,)
  )
  row = METHODS["dpo"].given(config)
  settings = (row.beta, row.alpha, row.epochs, row.lr_scale, row.lr_scales)
  assert settings == (0.2, 0.0, 2.0, 0.5, (0.5,))
  assert METHODS["kto"].given(config) == METHODS["kto"]
  # An alpha of zero is one that was given, not one left open.
  config.compare.oreo_step = MethodConfig(alpha=0.0)
  assert METHODS["oreo_step"].given(config).alpha == 0.0
  assert METHODS["oreo_step"].alpha == 0.1


def test_a_method_configures_the_stage_that_trains_it():
  config = Config(train=TrainConfig(beta=0.03, alpha=0.01, lr=1e-3, epochs=3.0))
  row = METHODS["oreo_step"].given(config)
  stage = row.configure(config, lr=2e-3, updates=7).train
  assert (stage.objective, stage.granularity) == ("oreo", "step")
  assert (stage.alpha, stage.lr, stage.updates) == (0.1, 2e-3, 7)
  # Passes that are asked for take the place of a number of updates.
  config.compare.dpo = MethodConfig(epochs=2.0)
  stage = METHODS["dpo"].given(config).configure(config, lr=1e-4, updates=7)
  assert (stage.train.epochs, stage.train.updates) == (2.0, 0)
  assert stage.train.beta == 0.1


def test_an_unknown_objective_is_refused_with_those_there_are():
  assert get_objective("kto").label == "KTO"
  # Not an objective on trajectories: it is a stage of its own.
  for name in ("ppo", "sft", "", "../x"):
    with pytest.raises(ConfigError, match="train.objective.*oreo") as caught:
      get_objective(name)
    assert repr(name) in str(caught.value)
  with pytest.raises(ConfigError, match="--config.baselines"):
    get_objective("ppo", "baselines")
