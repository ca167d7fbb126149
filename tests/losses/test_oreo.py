"""OREO losses against the float64 oracle: values, gradients, fixed point."""

import functools
import math

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
LAYOUTS = {
  # name: layout, reward on each token?
  "a row each": (cases.unpacked, True),
  "packed": (cases.packed, True),
  "packed, gaps": (functools.partial(cases.packed, gap=2), False),
}
# What is compiled in: each option alone or beside one that touches another
# part of the loss, and all at once.
OPTIONS = {
  "plain, k3": {},
  "exact KL, clip_log": {"kl": True, "clip_log": 0.4},
  "importance": {"importance_cap": math.e},
  "EMA, hinge": {"target_logps": True, "hinge": 0.7},
  "single step, EMA": {"single_step": True, "target_logps": True},
  "token mean": {"reduction": "token", "kl": True},
  "all": {
    "kl": True,
    "clip_log": 0.5,
    "importance_cap": 1.3,
    "target_logps": True,
    "hinge": 0.4,
    "reduction": "token",
  },
  "all, single step": {
    "importance_cap": math.e,
    "single_step": True,
    "hinge": 0.4,
  },
}
# Numbers that may differ from call to call.
SCALARS = {
  "beta": 0.3,
  "alpha": 0.2,
  "reward_scale": 1.0,
  "reward_offset": 0.0,
}
SCALED = {**SCALARS, "reward_scale": 2.0, "reward_offset": -0.5}


def to_jax(x):
  """f32 for floats; booleans, integers and None as they are."""
  if x is None:
    return None
  x = np.asarray(x)
  return jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype)


@functools.cache
def compiled(option):
  """Jitted: an `OreoLoss` and the gradients of its parts.

  The gradients are a dict of dicts: gradients[term][array].
  """
  names = ("logps", "ref_logps", "values", "kl", "target_logps")

  def evaluate(laid_out, scalars):
    def loss(arrays):
      arrays = {**laid_out, **arrays}
      options = {
        k: arrays[k] if v is True and k in names else v
        for k, v in OPTIONS[option].items()
      }
      return losses.oreo_loss(
        *(arrays[name] for name in ARRAYS),
        segment_ids=laid_out["segment_ids"],
        **options,
        **scalars,
      )

    out, pull = jax.vjp(loss, {name: laid_out[name] for name in names})
    zero = jax.tree.map(jnp.zeros_like, out)
    one = jnp.float32(1)
    gradients = {
      term: pull(zero._replace(**{term: one}))[0]
      for term in ("total", "value", "policy")
    }
    return out, gradients

  return jax.jit(
    evaluate, compiler_options={"xla_backend_optimization_level": 0}
  )


def implementation(option, laid_out, scalars=SCALARS):
  arrays = {k: to_jax(laid_out[k]) for k in (*cases.FIELDS, *cases.MASKS)}
  arrays["segment_ids"] = to_jax(laid_out["segment_ids"])
  return compiled(option)(arrays, {k: to_jax(v) for k, v in scalars.items()})


def to_oracle(options):
  """The oracle's names of the options."""
  options = dict(options)
  options["token_mean"] = options.pop("reduction", "sequence") == "token"
  options["reward_mul"] = options.pop("reward_scale", 1.0)
  options["reward_add"] = options.pop("reward_offset", 0.0)
  return options


def reference(option, laid_out, scalars=SCALARS, **live):
  """The oracle's dict of losses; `live` moves what gradients flow through."""
  options = to_oracle({**OPTIONS[option], **scalars})
  for name in ("kl", "target_logps"):
    if options.get(name) is True:
      options[name] = {**laid_out, **live}[name]
  arrays = {**laid_out, **live}
  return oracle.oreo_loss(
    *(arrays[name] for name in ARRAYS),
    segment_ids=laid_out["segment_ids"],
    frozen_logps=laid_out["logps"],
    frozen_values=laid_out["values"],
    **options,
  )


def check(option, laid_out, scalars=SCALARS):
  got, _ = implementation(option, laid_out, scalars)
  for name, value in reference(option, laid_out, scalars).items():
    np.testing.assert_allclose(
      getattr(got, name), value, rtol=2e-5, atol=2e-6, err_msg=name
    )
  return got


@pytest.mark.parametrize("scalars", [SCALARS, SCALED], ids=["", "scaled"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_oracle(option, granularity, layout, scalars):
  lay_out, per_token = LAYOUTS[layout]
  sequences = cases.trajectories(3, granularity, per_token=per_token)
  check(option, lay_out(sequences), scalars)


@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
def test_without_segment_ids_a_row_is_a_sequence(granularity):
  sequences = cases.trajectories(3, granularity, per_token=True)
  check("all", cases.unpacked(sequences, segment_ids=False), SCALED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_terminal_reward_of_a_row_is_a_reward_on_its_last_action(layout):
  laid_out = LAYOUTS[layout][0](cases.trajectories(4, "step"))
  laid_out["rewards"] = np.linspace(-1, 1, cases.ROWS)
  row = check("plain, k3", laid_out, SCALED)
  laid_out["rewards"] = oracle.spread_rewards(
    laid_out["rewards"], laid_out["action_mask"], laid_out["segment_ids"]
  )
  token = check("plain, k3", laid_out, SCALED)
  np.testing.assert_allclose(row.total, token.total, rtol=1e-6)


def test_rewards_on_observations_count_until_they_are_passed():
  """An action, an observation that pays 2, an action that pays 1."""
  mask = np.array([True, False, True, False])
  zero = np.zeros(4)
  sequence = dict.fromkeys(cases.FIELDS, zero)
  sequence |= dict.fromkeys(cases.MASKS, mask)
  sequence["rewards"] = np.array([0.0, 2.0, 1.0, 0.0])
  laid_out = cases.lay_out([sequence], [[0]])
  # R = 3, then 1; the one-step residuals see 2, then 1.
  got = check("plain, k3", laid_out)
  np.testing.assert_allclose(got.value, (9 + 1) / 2, rtol=1e-6)
  got = check("single step, EMA", laid_out)
  np.testing.assert_allclose(got.value, (4 + 1) / 2, rtol=1e-6)


@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_match_finite_differences(option, granularity):
  """Of the oracle, in which whatever is stopped stays a constant."""
  sequences = cases.trajectories(
    8, granularity, runs=((2, 1), (3,), (1,)), per_token=True
  )
  laid_out = cases.packed(sequences, rows=((0,), (2, 1)))
  _, gradients = implementation(option, laid_out, SCALED)
  for name in ("logps", "values", "kl"):
    expected = oracle.gradient(
      lambda x, name=name: reference(option, laid_out, SCALED, **{name: x})[
        "total"
      ],
      laid_out[name],
      laid_out["segment_ids"] > 0,
    )
    np.testing.assert_allclose(
      gradients["total"][name], expected, rtol=2e-4, atol=2e-6, err_msg=name
    )
  assert np.abs(gradients["total"]["logps"]).max() > 1e-3


@pytest.mark.parametrize("option", OPTIONS)
def test_losses_reach_disjoint_inputs(option):
  laid_out = cases.packed(cases.trajectories(2, "step"))
  _, gradients = implementation(option, laid_out)
  reached = {
    term: {name for name, x in arrays.items() if np.any(x)}
    for term, arrays in gradients.items()
  }
  penalty = {"kl"} if "kl" in OPTIONS[option] else set()
  assert reached == {
    "value": {"values"},
    "policy": {"logps"},
    "total": {"values", "logps"} | penalty,
  }


@pytest.mark.parametrize("option", OPTIONS)
def test_empty_masks_give_zero_and_finite_gradients(option):
  laid_out = cases.packed(cases.trajectories(5))
  for name in cases.MASKS:
    laid_out[name] = np.zeros_like(laid_out[name])
  loss, gradients = implementation(option, laid_out, SCALED)
  assert [float(x) for x in loss[:4]] == [0, 0, 0, 0]
  for name, x in loss.metrics.items():
    assert np.all(np.isfinite(x)), name
  for x in jax.tree.leaves(gradients):
    np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("option", ["plain, k3", "all", "all, single step"])
def test_sequences_without_decisions_do_not_count(option):
  """One with nothing to learn from must not thin out the mean."""
  sequences = cases.trajectories(6, "step")
  without = check(option, cases.packed(sequences, rows=((2, 0), (1, 4), (3,))))
  sequences[5] = {**sequences[5], **dict.fromkeys(cases.MASKS, False)}
  mute = check(option, cases.packed(sequences, rows=((2, 5, 0), (1, 4), (3,))))
  np.testing.assert_allclose(mute.total, without.total, rtol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
def test_all_equal_rewards_and_no_divergence(granularity, reward):
  """Policy = reference and V = R: nothing left to learn."""
  laid_out = cases.packed(cases.trajectories(7, granularity))
  laid_out["ref_logps"] = laid_out["logps"]
  laid_out["values"] = np.full_like(laid_out["logps"], reward)
  laid_out["rewards"] = np.full(cases.ROWS, reward)
  loss, gradients = implementation("plain, k3", laid_out)
  assert [float(x) for x in loss[:4]] == [0, 0, 0, 0]
  assert not any(np.any(x) for x in jax.tree.leaves(gradients))
  assert all(np.all(np.isfinite(x)) for x in loss.metrics.values())
  laid_out["values"] = laid_out["values"] + 0.5
  loss, _ = implementation("plain, k3", laid_out)
  np.testing.assert_allclose(loss.value, 0.25, rtol=1e-6)


def test_one_token_answers_are_alike_at_every_granularity():
  totals = set()
  for granularity in cases.GRANULARITIES:
    sequences = cases.trajectories(9, granularity, runs=((1,), (1,), (1,)))
    laid_out = cases.packed(sequences, rows=((2, 0), (1,)))
    totals.add(float(check("plain, k3", laid_out).total))
  assert len(totals) == 1


@pytest.mark.parametrize("option", ["plain, k3", "single step, EMA"])
@pytest.mark.parametrize("granularity", cases.GRANULARITIES)
def test_no_residual_at_the_optimum_of_a_token_tree(granularity, option):
  laid_out = cases.tree_paths(0.4, granularity, seed=2)
  scalars = {**SCALARS, "beta": 0.4}
  expected = reference(option, laid_out, scalars)
  assert expected["value"] < 1e-20 and expected["policy"] < 1e-20
  loss, _ = implementation(option, laid_out, scalars)
  assert float(loss.value) < 1e-10 and float(loss.policy) < 1e-10
  laid_out["values"] = laid_out["values"] + 0.1
  loss, _ = implementation(option, laid_out, scalars)
  assert float(loss.value) > 1e-3


@pytest.mark.parametrize("wrong", ARRAYS[1:])
def test_wrong_shapes_are_refused(wrong):
  laid_out = cases.packed(cases.trajectories(1))
  laid_out[wrong] = laid_out[wrong][:, :-1]
  with pytest.raises(ValueError):
    implementation("plain, k3", laid_out)
