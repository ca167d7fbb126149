"""What a step holds on a device, as the compiler counts it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.aot.program import train_program
from oreo_jax.config import Config, DataConfig, LoraConfig, TrainConfig
from oreo_jax.train import (
  OBJECTIVES,
  fit,
  frozen_base,
  full_params,
  init_state,
  make_setup,
  plain_models,
  rounds_base,
)
from oreo_jax.train.checkpoint import (
  CheckpointError,
  Checkpoints,
  abstract_like,
)
from oreo_jax.train.state import state_shardings

WEIGHTS = models.count_params(models.abstract_params(tiny.MODEL))


def make(objective="rejection", lora=False, **train):
  config = Config(
    lora=LoraConfig(policy=lora, rank=2),
    model=dataclasses.replace(tiny.MODEL),
    data=DataConfig(row_length=16),
    train=TrainConfig(objective=objective, batch_size=4, **train),
  )
  config.validate()
  return config


@functools.cache
def step_bytes(objective="rejection", lora=False, **train):
  """Bytes that a step takes as arguments, and what `oreo aot` counts."""
  program = train_program(make(objective, lora, **train), tiny.mesh())
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


def rounded(params):
  return jax.tree.map(
    lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params
  )


@pytest.mark.parametrize(
  "objective, lora",
  [("rejection", True), pytest.param("oreo", False, marks=pytest.mark.slow)],
)
def test_a_reference_in_bfloat16_saves_two_bytes_a_weight(objective, lora):
  full, _ = step_bytes(objective, lora)
  half, counted = step_bytes(objective, lora, reference_dtype="bfloat16")
  assert full - half == 2 * WEIGHTS
  held = jax.tree.leaves(counted["reference"])
  assert sum(x.size * x.dtype.itemsize for x in held) == 2 * WEIGHTS


def test_the_reference_is_rounded_and_the_start_is_not(tmp_path):
  config = make("oreo", reference_dtype="bfloat16")
  setup = make_setup(config, OBJECTIVES["oreo"], num_steps=0)
  exact = tiny.draw_params()
  base = frozen_base(exact, setup)
  tiny.assert_trees_close(base, rounded(exact), rtol=0, atol=0)
  with jax.set_mesh(tiny.mesh()):
    state = fit(
      base,
      None,
      setup,
      mesh=tiny.mesh(),
      directory=tmp_path,
      start=lambda: exact,
    )
  tiny.assert_trees_close(state.params["policy"], exact, rtol=0, atol=0)
  critic = {k: v for k, v in state.params["critic"].items() if k in exact}
  trunk = {k: exact[k] for k in critic}
  tiny.assert_trees_close(critic, trunk, rtol=0, atol=0)


def test_without_need_the_policy_itself_is_the_reference():
  exact = tiny.draw_params()
  for config in (
    make("oreo"),
    make("rejection", reference_dtype="bfloat16"),  # reads none
  ):
    objective = OBJECTIVES[config.train.objective]
    setup = make_setup(config, objective, num_steps=0)
    assert not rounds_base(setup)
    assert frozen_base(exact, setup) is exact


def test_adapters_are_not_rounded_with_the_base_when_they_are_saved():
  config = make("rejection", lora=True, reference_dtype="bfloat16")
  setup = make_setup(config, OBJECTIVES["rejection"], num_steps=0)
  base = frozen_base(tiny.draw_params(), setup)
  state = init_state(jax.random.key(0), setup, base)
  tiny_update = jax.tree.map(lambda x: x + 1e-5, state.params["policy"])
  full = full_params({"policy": tiny_update}, base, setup)
  saved, _ = plain_models(full, setup)
  kernel = np.asarray(saved["policy"]["layers"]["q"]["kernel"])
  before = np.asarray(base["layers"]["q"]["kernel"], np.float32)
  assert kernel.dtype == np.float32
  assert np.mean(kernel != before) > 0.9
