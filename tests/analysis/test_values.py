"""What is said of a value network, by hand and by a fresh forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.analysis.values import (
  analyse,
  answers_of,
  held_out_values,
  value_aucs,
)
from oreo_jax.config import Config, DataConfig, TrainConfig
from oreo_jax.data import make_loader
from oreo_jax.train import OBJECTIVES, init_state, make_setup


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def test_auc_within_a_problem_is_not_the_pooled_one():
  # Problem a is easy and its values are high: pooled, that looks like skill.
  # Within each problem the wrong answer has the higher value.
  scores = np.array([0.8, 0.8, 0.8, 0.9, 0.1, 0.2, 0.2, 0.2])
  labels = np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
  found = value_aucs(scores, labels, list("aaaabbbb"))
  assert found["heldout/within_problem_auc"] == 0.0
  # 16 pairs: 3 right ones of a beat the 3 of b; no other right one wins.
  assert found["heldout/pooled_auc"] == pytest.approx(9 / 16)


@pytest.mark.parametrize("label", [True, False])
def test_auc_of_one_class_is_not_a_number(label):
  found = value_aucs(np.arange(3.0), np.full(3, label), list("aab"))
  assert np.isnan(list(found.values())).all() and len(found) == 2


def test_analysis_reads_tenths_and_the_last_state_that_counts():
  states = np.array([10, 20, 10, 20])
  along = np.full((4, 22), 99.0)  # beyond the last state: must not be read
  for row, last in enumerate(states):
    along[row, : last + 1] = np.linspace(0, 1 if row % 2 else 0.5, last + 1)
  rewards = np.array([0.0, 1.0, 0.0, 1.0])
  found = analyse(along, states, rewards, list("aabb"))
  np.testing.assert_allclose(found["mean_correct"], np.arange(1, 11) / 10)
  np.testing.assert_allclose(found["mean_wrong"], np.arange(1, 11) / 20)
  assert found["within_problem_auc"] == [1.0] * 10
  assert found["pooled_auc"] == [1.0] * 10
  for kind in ("correct", "wrong"):
    counts = found["histogram"][kind]
    assert [sum(column) for column in counts] == [2] * 10
  assert sum(found["calibration"]["count"]) == 4


def test_analysis_undoes_the_scale_of_the_rewards():
  # The same network trained on 5 r - 2: its calibration was in one bin.
  rng = np.random.default_rng(0)
  along = rng.random((40, 8))
  states = np.full(40, 7)
  rewards = (rng.random(40) < along[:, 7]).astype(float)
  problems = [str(i // 4) for i in range(40)]
  plain = analyse(along, states, rewards, problems)
  scaled = analyse(
    5 * along - 2,
    states,
    rewards,
    problems,
    reward_scale=5.0,
    reward_offset=-2.0,
  )
  for key in ("mean_correct", "mean_wrong", "within_problem_auc"):
    np.testing.assert_allclose(scaled[key], plain[key])
  for key, numbers in plain["calibration"].items():
    np.testing.assert_allclose(scaled["calibration"][key], numbers)
  assert len(plain["calibration"]["count"]) == 10


def test_answers_of_finds_each_sequence_in_its_row():
  sequences = tiny.draw_sequences(12, seed=4)
  loader = make_loader(sequences, batch_size=4, row_length=16, seed=1)
  seen = []
  for step in range(loader.num_steps):
    batch = loader.batch(step)
    members = loader.sequence_indices(step)
    for member, targets in answers_of(batch, members, batch.targets):
      want = sequences[member]
      np.testing.assert_array_equal(targets, want.tokens[want.action_mask])
      seen.append(member)
  assert sorted(seen) == list(range(12))


def test_held_out_values_are_those_before_the_last_token():
  # AUCs of a plain forward, a sequence at a time.
  sequences = tiny.draw_sequences(24, seed=8)
  # Some credit does not make an answer right.
  for wrong in sequences[::2]:
    wrong.rewards[-1] = 0.3
  config = Config(
    model=tiny.MODEL,
    data=DataConfig(row_length=16),
    train=TrainConfig(batch_size=4),
  )
  setup = make_setup(config, OBJECTIVES["oreo"], 1)
  base = tiny.draw_params()
  critic = tiny.draw_params(head="value", seed=2)
  state = init_state(jax.random.key(0), setup, base, critic)
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  base = tiny.place(base, tiny.MODEL, mesh)
  params = {
    "policy": tiny.place(state.params["policy"], tiny.MODEL, mesh),
    "critic": tiny.place(critic, tiny.MODEL, mesh, head="value"),
  }
  with jax.set_mesh(mesh):
    measure = held_out_values(sequences, setup, config, mesh)
    found = measure(state._replace(params=params), base)
    spoilt = {**params, "critic": jax.tree.map(jnp.log, params["critic"])}
    with pytest.raises(FloatingPointError, match="held-out answer"):
      measure(state._replace(params=spoilt), base)
  tokens = np.zeros((24, 9), np.int32)
  for row, sequence in enumerate(sequences):
    tokens[row, : len(sequence.tokens)] = sequence.tokens
  hidden = models.apply(critic, jnp.asarray(tokens), tiny.MODEL).hidden
  values = np.asarray(models.values(critic, hidden))
  last = [len(sequence.tokens) - 2 for sequence in sequences]
  want = value_aucs(
    values[np.arange(24), last],
    np.array([s.rewards.sum() > 0.5 for s in sequences]),
    [s.problem for s in sequences],
  )
  assert found == pytest.approx(want)
  assert 0 < found["heldout/pooled_auc"] < 1
