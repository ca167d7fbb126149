"""What is said of a value network, worked by hand."""

import numpy as np
import pytest

from oreo_jax.analysis.values import analyse, value_aucs


def test_auc_within_a_problem_is_not_the_pooled_one():
  # Problem a is easy and its values are high: pooled, that looks like skill.
  # Within each problem the wrong answer has the higher value.
  scores = np.array([0.8, 0.8, 0.8, 0.9, 0.1, 0.2, 0.2, 0.2])
  labels = np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
  aucs = value_aucs(scores, labels, list("aaaabbbb"))
  assert aucs["heldout/within_problem_auc"] == 0.0
  # 16 pairs: 3 right ones of a beat the 3 of b; no other right one wins.
  assert aucs["heldout/pooled_auc"] == pytest.approx(9 / 16)


@pytest.mark.parametrize("label", [True, False])
def test_auc_of_one_class_is_not_a_number(label):
  aucs = value_aucs(np.arange(3.0), np.full(3, label), list("aab"))
  assert np.isnan(list(aucs.values())).all() and len(aucs) == 2


def test_analysis_reads_tenths_and_the_last_state_that_counts():
  states = np.array([10, 20, 10, 20])
  along = np.full((4, 22), 99.0)  # beyond the last state: must not be read
  for row, last in enumerate(states):
    along[row, : last + 1] = np.linspace(0, 1 if row % 2 else 0.5, last + 1)
  rewards = np.array([0.0, 1.0, 0.0, 1.0])
  analysis = analyse(along, states, rewards, list("aabb"))
  np.testing.assert_allclose(analysis["mean_correct"], np.arange(1, 11) / 10)
  np.testing.assert_allclose(analysis["mean_wrong"], np.arange(1, 11) / 20)
  assert analysis["within_problem_auc"] == [1.0] * 10
  assert analysis["pooled_auc"] == [1.0] * 10
  for kind in ("correct", "wrong"):
    counts = analysis["histogram"][kind]
    assert [sum(column) for column in counts] == [2] * 10
  assert sum(analysis["calibration"]["count"]) == 4


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


def test_analysis_reads_only_states_that_were_trained():
  # Trained after 0 and 4 tokens; every other state holds rubbish.
  trained = np.zeros((2, 11), bool)
  trained[:, [0, 4]] = True
  along = np.where(trained, 0.0, 99.0)
  along[1, 4] = 1.0
  analysis = analyse(
    along,
    np.array([10, 10]),
    np.array([0.0, 1.0]),
    list("aa"),
    trained=trained,
  )
  assert analysis["mean_wrong"] == [0.0] * 10
  assert analysis["mean_correct"] == [0.0] * 3 + [1.0] * 7
