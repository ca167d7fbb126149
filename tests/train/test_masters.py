"""Weights that are trained are held in float32, whatever `param_dtype` says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax.config import Config, CriticConfig, LoraConfig, TrainConfig
from oreo_jax.data import make_loader
from oreo_jax.train import (
  OBJECTIVES,
  full_params,
  init_state,
  make_setup,
  plain_models,
  train_step,
)

RATE = 5e-6  # the paper's
STEPS = 10


def make(objective, *, critic="separate", **model):
  config = Config(
    model=dataclasses.replace(tiny.MODEL, **model),
    critic=CriticConfig(kind=critic),
    lora=LoraConfig(rank=2, alpha=4.0),
    train=TrainConfig(
      objective=objective,
      batch_size=8,
      lr=RATE,
      schedule="constant",
      warmup=0.0,
      # Below it Adam divides by epsilon, and a step is smaller than the rate.
      eps=1e-12,
    ),
  )
  config.validate()
  return make_setup(config, OBJECTIVES[objective], STEPS, max_segments=8)


@functools.cache
def base(dtype="bfloat16"):
  """The same numbers in either dtype."""
  rounded = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), tiny.draw_params(seed=4)
  )
  return jax.tree.map(lambda x: x.astype(dtype), rounded)


@functools.cache
def batch():
  loader = make_loader(
    tiny.draw_sequences(24), batch_size=8, row_length=16, shuffle=False
  )
  return jax.tree.map(jnp.asarray, loader.batch(0))


@functools.cache
def updates(param_dtype, dtype):
  """What ten steps add to every weight of the policy."""
  setup = make("rejection", param_dtype=param_dtype, dtype=dtype)
  first = init_state(jax.random.key(0), setup, base(param_dtype))
  step = jax.jit(functools.partial(train_step, setup=setup))
  state = first
  for _ in range(STEPS):
    state, _ = step(state, None, batch())
  return jax.tree.map(
    lambda new, old: np.asarray(new, np.float64) - np.asarray(old, np.float64),
    state.params["policy"],
    first.params["policy"],
  )


def share_moved(tree):
  leaves = [np.ravel(x) for x in jax.tree.leaves(tree)]
  return np.mean(np.concatenate(leaves) != 0)


@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_ten_steps_move_weights_that_are_loaded_in_bfloat16(dtype):
  moved = updates("bfloat16", dtype)
  assert share_moved(moved) > 0.99
  # The base has the same numbers in both runs, and so have the updates.
  tiny.assert_trees_close(
    moved, updates("float32", dtype), rtol=1e-3, atol=RATE * 1e-3
  )
  # Ten steps of Adam at this rate, less what float32 rounds.
  largest = max(np.abs(x).max() for x in jax.tree.leaves(moved))
  assert 0.8 * STEPS * RATE < largest < 1.2 * STEPS * RATE


@pytest.mark.parametrize("critic", ["separate", "lora", "shared"])
def test_all_that_is_trained_is_float32_and_what_is_saved_is_not(critic):
  setup = make("oreo", critic=critic, param_dtype="bfloat16")
  state = init_state(jax.random.key(0), setup, base())
  for leaf in jax.tree.leaves(state.params):
    assert leaf.dtype == jnp.float32
  full = full_params(state.params, base(), setup)
  if critic == "lora":
    # The frozen base is shared as it is.
    assert full["critic"]["embedding"] is base()["embedding"]
  plain, config = plain_models(full, setup)
  assert config.param_dtype == "bfloat16"
  for tree in plain.values():
    head = tree.pop("value_head", None)
    assert head is None or head.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
  tiny.assert_trees_close(plain["policy"], base(), rtol=0, atol=0)
