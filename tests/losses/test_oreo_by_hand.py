"""OREO losses, their options and KL terms against numbers worked by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import oreo as oracle

from oreo_jax import losses

FAST = {"xla_backend_optimization_level": 0}

# Two rows, beta 1/2. Row 0: a prompt slot, two actions with d = 1/2, -1, R = 1.
# Row 1: one action with d = 1, R = 0. Prompt and padding hold 7.
HAND = (
  np.array([[7.0, -1.0, -2.0, 7.0], [7.0, -1.0, 7.0, 7.0]]),
  np.array([[-7.0, -1.5, -1.0, -7.0], [-7.0, -2.0, -7.0, -7.0]]),
  np.array([[7.0, 0.2, 0.6, 7.0], [7.0, 0.5, 7.0, 7.0]]),
  np.array([1.0, 0.0]),
  np.array([[False, True, True, False], [False, True, False, False]]),
)
TOKEN = HAND[4]
RESPONSE = np.array([[False, True, False, False], [False, True, False, False]])
# D = -1/2, -1 and 1, so R - beta D = 1.25, 1.5 and -0.5, and the residuals
# V - R + beta D are -1.05, -0.9 and 1.
TABLE = [
  # decisions, options, loss
  (TOKEN, {}, ((1.1025 + 0.81) / 2 + 1) / 2),
  (TOKEN, {"reduction": "token"}, (1.1025 + 0.81 + 1) / 3),
  (RESPONSE, {}, (1.1025 + 1) / 2),
  # exp(D_0) = exp(-1/2) and, capped, e.
  (
    TOKEN,
    {"importance_cap": math.e},
    (math.exp(-0.5) * 0.95625 + math.e) / 2,
  ),
  # R = 2 * 1 - 1 = 1 and -1: only row 1 changes, to 0.5 + 1 + 0.5 = 2.
  (
    TOKEN,
    {"reward_scale": 2.0, "reward_offset": -1.0},
    (0.95625 + 4) / 2,
  ),
  # 0.2 - 0.6 + 0.25 = -0.15; 0.6 - 1 - 0.5 = -0.9; 0.5 + 0.5 = 1.
  (TOKEN, {"single_step": True}, ((0.0225 + 0.81) / 2 + 1) / 2),
]


def evaluate(name, decisions, **options):
  """A loss of the hand-made case, jitted."""
  loss = functools.partial(getattr(losses, name), beta=0.5, **options)
  return jax.jit(loss, compiler_options=FAST)(*arrays(decisions))


def arrays(decisions):
  floats = [jnp.asarray(x, jnp.float32) for x in HAND[:4]]
  return [*floats, jnp.asarray(HAND[4]), jnp.asarray(decisions)]


@pytest.mark.parametrize("decisions, options, expected", TABLE)
@pytest.mark.parametrize("name", ["value_loss", "policy_loss"])
def test_worked_by_hand(name, decisions, options, expected):
  got = evaluate(name, decisions, **options)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  # The oracle has to pass the same table.
  options = dict(options)
  options["token_mean"] = options.pop("reduction", "sequence") == "token"
  options["reward_mul"] = options.pop("reward_scale", 1.0)
  options["reward_add"] = options.pop("reward_offset", 0.0)
  got = getattr(oracle, name)(*HAND, decisions, beta=0.5, **options)
  np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_clip_log_and_ema_by_hand():
  ref_logps = arrays(TOKEN)[1]
  # D = -1/2, -1, 1 clipped at 0.6: targets 1.25, 1.3, -0.3.
  got = evaluate("value_loss", TOKEN, clip_log=0.6)
  np.testing.assert_allclose(
    got, ((1.05**2 + 0.7**2) / 2 + 0.8**2) / 2, rtol=1e-6
  )
  # Averaged policy equal to the reference: D = 0, targets R.
  got = evaluate("value_loss", TOKEN, target_logps=ref_logps)
  np.testing.assert_allclose(
    got, ((0.8**2 + 0.4**2) / 2 + 0.5**2) / 2, rtol=1e-6
  )
  for option in ({"clip_log": 0.6}, {"target_logps": ref_logps}):
    np.testing.assert_allclose(
      evaluate("policy_loss", TOKEN, **option), 0.978125, rtol=1e-6
    )


def test_hinge_by_hand():
  # D_0 = -1/2 in the one positive row: a mean of 1/2, times 3. The other row
  # does not count, neither above nor below the line.
  plain = evaluate("policy_loss", RESPONSE)
  got = evaluate("policy_loss", RESPONSE, hinge=3.0)
  np.testing.assert_allclose(got - plain, 1.5, rtol=1e-5)


def test_gradients_by_hand():
  given = arrays(TOKEN)

  def total(logps, values):
    return losses.oreo_loss(logps, given[1], values, *given[3:], beta=0.5).total

  gradient = jax.jit(jax.grad(total, (0, 1)), compiler_options=FAST)
  logps, values = gradient(given[0], given[2])
  # 2 * residual / decisions / sequences, and times beta for the policy. Were
  # D not stopped, the second token would also hear of the first residual.
  expected = np.array([[0, -0.525, -0.45, 0], [0, 1.0, 0, 0]])
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  np.testing.assert_allclose(logps, 0.5 * expected, rtol=1e-5)


def test_k3_is_the_formula_and_stops_at_the_reference():
  logps = np.array([[-0.5, -2.0, -3.0]])
  ref_logps = np.array([[-0.5, -1.0, -5.0]])
  got = losses.kl_k3(jnp.float32(logps), jnp.float32(ref_logps))
  np.testing.assert_allclose(
    got, [[0, math.e - 2, math.exp(-2) + 1]], rtol=1e-5, atol=1e-7
  )
  np.testing.assert_allclose(got, oracle.kl_k3(logps, ref_logps), rtol=1e-5)
  grads = jax.grad(lambda x, y: losses.kl_k3(x, y).sum(), (0, 1))(
    jnp.float32(logps), jnp.float32(ref_logps)
  )
  # d/dlogp (exp(r) - 1 - r) = 1 - exp(r).
  np.testing.assert_allclose(
    grads[0], 1 - np.exp(ref_logps - logps), rtol=1e-5, atol=1e-7
  )
  np.testing.assert_array_equal(grads[1], 0)


def test_alpha_rises_above_the_target_and_falls_below():
  for kl, target in ((0.5, 0.1), (0.05, 0.1)):
    args = [jnp.float32(x) for x in (-1.5, kl)]
    value, grads = jax.value_and_grad(losses.alpha_loss, (0, 1))(*args, target)
    np.testing.assert_allclose(
      value, oracle.alpha_loss(-1.5, kl, target), rtol=1e-6
    )
    np.testing.assert_allclose(grads[0], target - kl, rtol=1e-6)
    assert float(grads[1]) == 0


def test_unknown_reduction_is_refused():
  with pytest.raises(ValueError, match="reduction"):
    evaluate("value_loss", TOKEN, reduction="batch")
