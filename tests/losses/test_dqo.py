"""DQO against a table worked by hand, the float64 oracle, OREO and a tree."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cases
from oracles import dqo as oracle
from oracles.oreo import gradient

from oreo_jax import losses

ARRAYS = (
  "logps",
  "ref_logps",
  "values",
  "rewards",
  "action_mask",
  "decision_mask",
)
OPTIONS = {
  "no weight": {"importance_cap": None},
  "default weight": {},
  "token mean, cap": {"importance_cap": 1.2, "reduction": "token"},
}
CAPS = {"no weight": None, "default weight": math.e, "token mean, cap": 1.2}
LAYOUTS = {
  "a row each": cases.unpacked,
  "packed, gaps": functools.partial(cases.packed, gap=2),
}


def to_jax(x):
  x = np.asarray(x)
  return jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype)


@functools.cache
def compiled(option):
  """Jitted: an `OreoLoss` and gradients[term] = (of logps, of values)."""

  def evaluate(arrays, segment_ids, scalars):
    def loss(logps, values):
      return losses.dqo_loss(
        logps,
        arrays[1],
        values,
        *arrays[3:],
        segment_ids=segment_ids,
        **OPTIONS[option],
        **scalars,
      )

    out, pull = jax.vjp(loss, arrays[0], arrays[2])
    zero = jax.tree.map(jnp.zeros_like, out)
    one = jnp.float32(1)
    return out, {
      term: pull(zero._replace(**{term: one}))
      for term in ("total", "value", "policy")
    }

  return jax.jit(
    evaluate, compiler_options={"xla_backend_optimization_level": 0}
  )


def implementation(option, laid_out, **scalars):
  scalars = {"beta": 0.3, "lambda_": 1.0, "reward_scale": 1.0, **scalars}
  return compiled(option)(
    [to_jax(laid_out[name]) for name in ARRAYS],
    to_jax(laid_out["segment_ids"]),
    {k: jnp.float32(v) for k, v in scalars.items()},
  )


def reference(option, laid_out, *, beta=0.3, lambda_=1.0, **kwargs):
  live = {k: kwargs.pop(k) for k in ("logps", "values") if k in kwargs}
  arrays = {**laid_out, **live}
  return oracle.dqo_loss(
    *(arrays[name] for name in ARRAYS),
    segment_ids=laid_out["segment_ids"],
    frozen_logps=laid_out["logps"],
    frozen_values=laid_out["values"],
    beta=beta,
    lam=lambda_,
    weight_cap=CAPS[option],
    token_mean="reduction" in OPTIONS[option],
    **kwargs,
  )


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_oracle(option, granularity, layout, lambda_):
  sequences = cases.trajectories(11, granularity, per_token=lambda_ > 0)
  laid_out = LAYOUTS[layout](sequences)
  got, _ = implementation(option, laid_out, lambda_=lambda_, reward_scale=1.5)
  value, policy = reference(option, laid_out, lambda_=lambda_, reward_mul=1.5)
  np.testing.assert_allclose(got.value, value, rtol=2e-5)
  np.testing.assert_allclose(got.policy, policy, rtol=2e-5)
  np.testing.assert_allclose(got.total, value + policy, rtol=2e-5)


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_match_finite_differences(option, lambda_):
  sequences = cases.trajectories(
    12, "step", runs=((2, 2), (3,), (1,)), per_token=True
  )
  laid_out = cases.packed(sequences, rows=((1, 0), (2,)))
  _, gradients = implementation(option, laid_out, lambda_=lambda_)
  used = laid_out["segment_ids"] > 0
  for i, name in enumerate(("logps", "values")):
    expected = gradient(
      lambda x, name=name: sum(
        reference(option, laid_out, lambda_=lambda_, **{name: x})
      ),
      laid_out[name],
      used,
    )
    np.testing.assert_allclose(
      gradients["total"][i], expected, rtol=2e-4, atol=2e-6, err_msg=name
    )
  np.testing.assert_array_equal(gradients["value"][0], 0)
  np.testing.assert_array_equal(gradients["policy"][1], 0)


def hand_case():
  """One answer of three tokens: beta 1/2, d = 1, -1, 2, R = 1, V as below."""
  d = np.array([1.0, -1.0, 2.0])
  mask = np.ones(3, bool)
  sequence = dict.fromkeys(cases.FIELDS, np.zeros(3))
  sequence |= {
    "logps": d - 3,
    "ref_logps": np.full(3, -3.0),
    "values": np.array([0.4, 0.2, 0.6]),
    "rewards": np.array([0.0, 0.0, 1.0]),
    "action_mask": mask,
    "decision_mask": mask,
  }
  return cases.lay_out([sequence], [[0]])


@pytest.mark.parametrize(
  "lambda_, returns",
  [
    # Soft rewards r - d / 2: -0.5, 0.5, 0.
    (1.0, (0.0, 0.5, 0.0)),
    # plus the next value: -0.5 + 0.2, 0.5 + 0.6, 0.
    (0.0, (-0.3, 1.1, 0.0)),
    # plus half of value and return: 0.5 + 0.3 + 0, -0.5 + 0.1 + 0.4.
    (0.5, (0.0, 0.8, 0.0)),
  ],
)
def test_worked_by_hand(lambda_, returns):
  a, b, c = returns
  value = ((0.4 - a) ** 2 + (0.2 - b) ** 2 + (0.6 - c) ** 2) / 3
  # beta d + V - r - G_next.
  policy = ((0.9 - b) ** 2 + (-0.3 - c) ** 2 + (1.6 - 1) ** 2) / 3
  laid_out = hand_case()
  got, _ = implementation("no weight", laid_out, beta=0.5, lambda_=lambda_)
  np.testing.assert_allclose(got.value, value, rtol=1e-5)
  np.testing.assert_allclose(got.policy, policy, rtol=1e-5)
  # D_0 = 2 is over the cap: the policy loss is e times as large.
  got, _ = implementation("default weight", laid_out, beta=0.5, lambda_=lambda_)
  np.testing.assert_allclose(got.value, value, rtol=1e-5)
  np.testing.assert_allclose(got.policy, math.e * policy, rtol=1e-5)


@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
def test_monte_carlo_returns_make_it_oreo(granularity):
  laid_out = cases.packed(cases.trajectories(13, granularity, per_token=True))
  got, gradients = implementation("no weight", laid_out)
  arrays = [to_jax(laid_out[name]) for name in ARRAYS]

  def oreo(logps, values):
    moved = [logps, arrays[1], values, *arrays[3:]]
    segment_ids = to_jax(laid_out["segment_ids"])
    return losses.oreo_loss(*moved, beta=0.3, segment_ids=segment_ids).total

  expected, expected_gradients = jax.jit(
    jax.value_and_grad(oreo, (0, 1)),
    compiler_options={"xla_backend_optimization_level": 0},
  )(arrays[0], arrays[2])
  np.testing.assert_allclose(got.total, expected, rtol=1e-5)
  for x, y in zip(gradients["total"], expected_gradients, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("option", OPTIONS)
def test_no_residual_at_the_optimum_of_a_token_tree(option, lambda_):
  laid_out = cases.tree_paths(0.4, "token", seed=5)
  got, _ = implementation(option, laid_out, beta=0.4, lambda_=lambda_)
  assert float(got.value) < 1e-10 and float(got.policy) < 1e-10
  laid_out["logps"] = laid_out["ref_logps"]
  got, _ = implementation(option, laid_out, beta=0.4, lambda_=lambda_)
  assert float(got.policy) > 1e-3


@pytest.mark.parametrize("option", OPTIONS)
def test_empty_masks_give_zero_and_finite_gradients(option):
  laid_out = cases.packed(cases.trajectories(14))
  for name in cases.MASKS:
    laid_out[name] = np.zeros_like(laid_out[name])
  got, gradients = implementation(option, laid_out, lambda_=0.5)
  assert [float(x) for x in got[:4]] == [0, 0, 0, 0]
  assert all(np.all(np.isfinite(x)) for x in got.metrics.values())
  for x in jax.tree.leaves(gradients):
    np.testing.assert_array_equal(x, 0)
