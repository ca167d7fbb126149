"""Soft Bellman residuals: by hand, against the oracle, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cases
from oracles import oreo as oracle

from oreo_jax import losses

ARRAYS = (
  "logps",
  "ref_logps",
  "values",
  "rewards",
  "action_mask",
  "decision_mask",
)
BETA = 0.3


def to_jax(x):
  x = np.asarray(x)
  return jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype)


def evaluate(laid_out, **options):
  call = functools.partial(losses.soft_bellman_residuals, beta=BETA, **options)
  return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})(
    *(to_jax(laid_out[name]) for name in ARRAYS),
    segment_ids=to_jax(laid_out["segment_ids"]),
  )


def by_hand():
  """A prompt slot, two actions with d = 1/2 and -1, padding, reward 1."""
  return [
    jnp.asarray([[7.0, -1.0, -2.0, 7.0]]),
    jnp.asarray([[-7.0, -1.5, -1.0, -7.0]]),
    jnp.asarray([[7.0, 0.2, 0.6, 7.0]]),
    jnp.asarray([1.0]),
    jnp.asarray([[False, True, True, False]]),
  ]


@pytest.mark.parametrize(
  ("options", "target", "policy"),
  [
    # D = -1/2, -1, so that R - D / 2 = 1.25, 1.5.
    ({}, [1.25, 1.5], [-1.05, -0.9]),
    # |D| <= 0.6 in the target alone: R + 0.3 at the second.
    ({"clip_log": 0.6}, [1.25, 1.3], [-1.05, -0.9]),
    # r = 0, 1, V_next = 0.6, 0 and A = 1/2, -1.
    ({"single_step": True}, [0.35, 1.5], [-0.15, -0.9]),
    # R = 2 * 1 - 1: no change.
    ({"reward_scale": 2.0, "reward_offset": -1.0}, [1.25, 1.5], [-1.05, -0.9]),
  ],
)
def test_worked_by_hand(options, target, policy):
  arrays = by_hand()
  off = losses.soft_bellman_residuals(*arrays, arrays[4], beta=0.5, **options)
  np.testing.assert_allclose(off.target, [[0, *target, 0]], rtol=1e-6)
  np.testing.assert_allclose(off.policy, [[0, *policy, 0]], rtol=1e-6)
  expected = np.array([0.2, 0.6]) - target
  np.testing.assert_allclose(off.value, [[0, *expected, 0]], rtol=1e-6)


def test_an_averaged_policy_supplies_the_target_alone():
  arrays = by_hand()
  # Equal to the reference: D = 0, and the target is the reward.
  off = losses.soft_bellman_residuals(
    *arrays, arrays[4], beta=0.5, target_logps=arrays[1]
  )
  np.testing.assert_allclose(off.target, [[0, 1, 1, 0]], rtol=1e-6)
  np.testing.assert_allclose(off.policy, [[0, -1.05, -0.9, 0]], rtol=1e-6)


@pytest.mark.parametrize("single_step", [False, True])
@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
def test_matches_oracle(granularity, single_step):
  sequences = cases.trajectories(51, granularity, per_token=True)
  laid_out = cases.packed(sequences, gap=1)
  off = evaluate(laid_out, single_step=single_step)
  expected = np.zeros((3, cases.ROWS, cases.LENGTH))
  # The oracle lists sequences row by row, as they are found in the rows here.
  expected_sequences = oracle.trajectories(
    *(laid_out[name] for name in ARRAYS), segment_ids=laid_out["segment_ids"]
  )
  places = oracle.sequences(laid_out["action_mask"], laid_out["segment_ids"])
  for (b, indices), path in zip(places, expected_sequences, strict=True):
    starts = [t for t in indices if laid_out["decision_mask"][b, t]]
    for t, x in zip(starts, path.decisions, strict=True):
      if single_step:
        target = x.reward + x.next_value - BETA * x.advantage
      else:
        target = x.ret - BETA * x.suffix
      expected[:, b, t] = x.value - target, x.value - target, target
  np.testing.assert_allclose(off[:3], expected, rtol=1e-4, atol=1e-5)


def test_losses_are_the_mean_squares():
  sequences = cases.trajectories(52, "step", per_token=True)
  laid_out = cases.packed(sequences)
  off = evaluate(laid_out)
  arrays = [to_jax(laid_out[name]) for name in ARRAYS]
  loss = losses.oreo_loss(
    *arrays, beta=BETA, segment_ids=to_jax(laid_out["segment_ids"])
  )
  squares = [
    np.mean(np.square(row[starts]), dtype=np.float64)
    for row, starts in zip(
      cases.gather(off.value, laid_out),
      cases.gather(laid_out["decision_mask"], laid_out),
      strict=True,
    )
  ]
  np.testing.assert_allclose(loss.value, np.mean(squares), rtol=1e-5)
  np.testing.assert_allclose(loss.policy, np.mean(squares), rtol=1e-5)


def test_a_residual_moves_the_own_value_and_the_own_action_alone():
  """Three steps of two tokens; step 1 is pulled."""
  rng = np.random.default_rng(0)
  logps, ref_logps, values = (
    jnp.asarray(rng.normal(size=(1, 6)), jnp.float32) for _ in range(3)
  )
  mask = jnp.ones((1, 6), bool)
  starts = jnp.asarray([[True, False] * 3])

  def residuals(logps, values):
    off = losses.soft_bellman_residuals(
      logps, ref_logps, values, jnp.ones((1,)), mask, starts, beta=BETA
    )
    return off.value, off.policy

  _, pull = jax.vjp(residuals, logps, values)
  second, nothing = jnp.zeros((1, 6)).at[0, 2].set(1.0), jnp.zeros((1, 6))
  by_logps, by_values = pull((second, nothing))
  np.testing.assert_array_equal(by_logps, nothing)
  np.testing.assert_array_equal(by_values, second)
  by_logps, by_values = pull((nothing, second))
  own_action = [[0, 0, BETA, BETA, 0, 0]]
  np.testing.assert_allclose(by_logps, own_action, rtol=1e-6)
  np.testing.assert_array_equal(by_values, nothing)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_padding_is_never_seen(garbage):
  laid_out = cases.packed(cases.trajectories(53, "step"))
  expected = evaluate(laid_out)
  for name in ("logps", "ref_logps", "values"):
    actions = laid_out["action_mask"]
    laid_out[name] = np.where(actions, laid_out[name], garbage)
  off = evaluate(laid_out)
  for got, same in zip(off[:3], expected[:3], strict=True):
    np.testing.assert_array_equal(got, same)


def test_wrong_shapes_are_refused():
  arrays = by_hand()
  with pytest.raises(ValueError, match=r"rewards must be \[B\] or \[B, T\]"):
    losses.soft_bellman_residuals(
      *arrays[:3], jnp.ones((3,)), arrays[4], arrays[4], beta=0.5
    )
