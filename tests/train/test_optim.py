"""Schedules by their closed form, and which weights decay."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles import tiny

from oreo_jax.config import StageConfig, TrainConfig
from oreo_jax.train.optim import (
  make_critic_optimizer,
  make_optimizer,
  make_schedule,
)

STEPS, PEAK = 50, 0.2


def closed_form(step, *, schedule, warmup, final):
  """Learning rate of a step, in plain Python."""
  rising = round(warmup * STEPS)
  if step < rising:
    # From peak / rising to the peak, in equal parts.
    first = PEAK / rising
    return first + (PEAK - first) * step / rising
  progress = min((step - rising) / (STEPS - rising), 1.0)
  if schedule == "cosine":
    return PEAK * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
  if schedule == "linear":
    return PEAK * (1 + (final - 1) * progress)
  return PEAK


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup, final", [(0.0, 0.0), (0.1, 0.0), (0.2, 0.25)])
def test_schedule_has_its_closed_form(schedule, warmup, final):
  stage = StageConfig(schedule=schedule, warmup=warmup, final_lr=final)
  rate = make_schedule(stage, PEAK, STEPS)
  rates = [float(rate(jnp.int32(step))) for step in range(STEPS + 1)]
  want = [
    closed_form(step, schedule=schedule, warmup=warmup, final=final)
    for step in range(STEPS + 1)
  ]
  np.testing.assert_allclose(rates, want, rtol=1e-5, atol=1e-7)
  assert rates[0] > 0
  assert max(rates) == pytest.approx(PEAK)
  if schedule != "constant":
    assert rates[-1] == pytest.approx(PEAK * final, abs=1e-7)


def test_only_matrices_decay():
  stage = StageConfig(
    weight_decay=0.5, schedule="constant", warmup=0.0, clip_norm=0.0
  )
  params = tiny.draw_params(head="value")
  params["layers"]["q"]["bias"] = jnp.ones((2, 4, 4))
  optimizer = make_optimizer(stage, 0.1, STEPS)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  # Without a gradient the update is the decay alone: -lr * decay * weight.
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    name = path[-1].key
    weight = params
    for key in path:
      weight = weight[key.key]
    if name in ("kernel", "embedding"):
      np.testing.assert_allclose(update, -0.05 * weight, rtol=1e-6)
    else:
      assert name in ("scale", "bias", "value_head")
      assert not np.any(update)


def test_the_value_head_can_have_a_rate_of_its_own():
  config = TrainConfig(critic_lr=0.1, schedule="constant", warmup=0.0)
  params = tiny.draw_params(head="value")
  ones = jax.tree.map(jnp.ones_like, params)

  def updates(config):
    optimizer = make_critic_optimizer(config, STEPS)
    return optimizer.update(ones, optimizer.init(params), params)[0]

  same = updates(config)
  config.value_head_lr = 0.02
  own = updates(config)
  # Adam's first step has the size of the rate.
  np.testing.assert_allclose(same.pop("value_head"), -0.1, rtol=1e-5)
  np.testing.assert_allclose(own.pop("value_head"), -0.02, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, own, same)


def test_gradients_are_clipped_by_their_global_norm():
  stage = StageConfig(clip_norm=1.0, eps=1.0, schedule="constant", warmup=0.0)
  optimizer = make_optimizer(stage, 1.0, STEPS)
  params = {"a": {"kernel": jnp.zeros(1)}, "b": {"kernel": jnp.zeros(1)}}
  gradient = {
    "a": {"kernel": jnp.full(1, 30.0)},
    "b": {"kernel": jnp.full(1, 40.0)},
  }
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  # (30, 40) has norm 50: clipped to (0.6, 0.8); Adam's first step with an
  # epsilon of 1 is g / (|g| + 1).
  np.testing.assert_allclose(updates["a"]["kernel"], -0.6 / 1.6, rtol=1e-5)
  np.testing.assert_allclose(updates["b"]["kernel"], -0.8 / 1.8, rtol=1e-5)


def noisy_gradients(steps, size=512):
  """Gradients of mean 1 whose entries differ, in float32."""
  rng = np.random.default_rng(7)
  return 1 + 0.5 * rng.standard_normal((steps, size)).astype(np.float32)


def adam_by_hand(gradients, dtype, *, b1, b2, eps):
  """Adam's updates and first moment, in float64 but for the moment's dtype."""
  mean = np.zeros(gradients.shape[1], dtype)
  square = np.zeros(gradients.shape[1])
  updates = []
  for count, gradient in enumerate(gradients.astype(np.float64), start=1):
    exact = b1 * mean.astype(np.float64) + (1 - b1) * gradient
    square = b2 * square + (1 - b2) * gradient**2
    scale = np.sqrt(square / (1 - b2**count)) + eps
    updates.append(-exact / (1 - b1**count) / scale)
    mean = exact.astype(dtype)
  return np.array(updates), mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_is_rounded_once_a_step_and_no_more(dtype):
  stage = StageConfig(
    moment_dtype=dtype, schedule="constant", warmup=0.0, clip_norm=0.0
  )
  gradients = noisy_gradients(200)
  params = {"kernel": jnp.zeros(gradients.shape[1])}
  optimizer = make_optimizer(stage, 1.0, len(gradients))
  state = optimizer.init(params)
  step = jax.jit(optimizer.update)
  updates = []
  for gradient in gradients:
    update, state = step({"kernel": jnp.asarray(gradient)}, state, params)
    updates.append(np.asarray(update["kernel"]))
  adam = state[1][0]
  assert adam.mu["kernel"].dtype == dtype
  assert adam.nu["kernel"].dtype == "float32"
  want, mean = adam_by_hand(
    gradients,
    {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype],
    b1=stage.b1,
    b2=stage.b2,
    eps=stage.eps,
  )
  got = np.array(updates)
  # float32 and float64 lie on two sides of a tie now and then, and are then
  # rounded to neighbours in bfloat16.
  close = np.isclose(got, want, rtol=1e-5)
  assert close.mean() > 0.99
  np.testing.assert_allclose(got, want, rtol=2**-8)
  # optax's own mu_dtype gives 0.984 here: 0.9 is 0.8984 in bfloat16.
  moment = np.asarray(adam.mu["kernel"], np.float64)
  np.testing.assert_allclose(
    moment.mean(), mean.astype(float).mean(), rtol=1e-4
  )
  exact = adam_by_hand(
    gradients, np.float64, b1=stage.b1, b2=stage.b2, eps=stage.eps
  )[0]
  # Each rounding errs by half an ulp, 2^-9, and a moment remembers about
  # b1 / (1 - b1) = 9 of them.
  np.testing.assert_allclose(got, exact, rtol=9 * 2**-9, atol=9 * 2**-9)
  assert abs(got[-1] - exact[-1]).mean() < 9 * 2**-9 / 3
