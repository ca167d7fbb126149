"""What a step holds on a device, as the compiler counts it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.aot.program import train_program
from oreo_jax.config import Config, DataConfig, TrainConfig
from oreo_jax.train import OBJECTIVES, init_state, make_setup
from oreo_jax.train.checkpoint import (
  CheckpointError,
  Checkpoints,
  abstract_like,
)
from oreo_jax.train.state import state_shardings

WEIGHTS = models.count_params(models.abstract_params(tiny.MODEL))


def make(objective="rejection", **train):
  config = Config(
    model=dataclasses.replace(tiny.MODEL),
    data=DataConfig(row_length=16),
    train=TrainConfig(objective=objective, batch_size=4, **train),
  )
  config.validate()
  return config


@functools.cache
def step_bytes(objective="rejection", **train):
  """Bytes that a step takes as arguments, and what `oreo aot` counts."""
  program = train_program(make(objective, **train), tiny.mesh())
  counted = program.arguments
  compiled = program.lower().compile().memory_analysis()
  return compiled.argument_size_in_bytes, counted


def test_a_first_moment_in_bfloat16_saves_two_bytes_a_weight():
  full, _ = step_bytes()
  half, counted = step_bytes(moment_dtype="bfloat16")
  assert full - half == 2 * WEIGHTS
  state = counted["optimiser"][1]["policy"]
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert held - (4 + 2) * WEIGHTS <= 8  # two counters beside the moments


def test_a_checkpoint_has_the_dtype_of_its_moments(tmp_path):
  def state_of(dtype):
    config = make(moment_dtype=dtype)
    setup = make_setup(config, OBJECTIVES["rejection"], 10)
    state = init_state(jax.random.key(0), setup, tiny.draw_params())
    shardings = state_shardings(setup, state, tiny.mesh())
    return state, abstract_like(state, shardings)

  state, abstract = state_of("bfloat16")
  _, other = state_of("float32")
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    restored = checkpoints.restore(abstract)
    with pytest.raises(CheckpointError, match=r"bfloat16\[.* there and float3"):
      checkpoints.restore(other)
  moments = restored.opt_state["policy"][1][0]
  assert {x.dtype for x in jax.tree.leaves(moments.mu)} == {
    jnp.dtype("bfloat16")
  }
  tiny.assert_trees_close(restored, state, rtol=0, atol=0)
