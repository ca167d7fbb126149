"""What a step holds on a device, as the compiler counts it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from aot.tiny_step import maze_config
from oracles import tiny

from oreo_jax import memory, models
from oreo_jax.aot import jobs
from oreo_jax.aot.program import train_program
from oreo_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  LoraConfig,
  MeshConfig,
  TrainConfig,
)
from oreo_jax.data import make_loader
from oreo_jax.models.presets import preset
from oreo_jax.progress import Progress
from oreo_jax.sharding import shard_batch
from oreo_jax.train import (
  OBJECTIVES,
  fit,
  frozen_base,
  full_params,
  init_state,
  make_setup,
  make_train_step,
  plain_models,
)
from oreo_jax.train.checkpoint import (
  CheckpointError,
  Checkpoints,
  abstract_like,
)
from oreo_jax.train.frozen import is_policy
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


@pytest.mark.slow
@pytest.mark.parametrize(
  "objective, lora", [("rejection", True), ("oreo", False)]
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
    assert is_policy(setup)
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


MESH = {"fsdp": 2, "tensor": 2}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@functools.cache
def trained(offload, **changes):
  """The losses of three steps, and the moments and weights after them."""
  config = make("oreo", lr=1e-2, warmup=0.0, offload=offload, **changes)
  setup = make_setup(config, OBJECTIVES["oreo"], num_steps=3, max_segments=8)
  mesh = tiny.mesh(**MESH)
  policy = tiny.place(tiny.draw_params(), tiny.MODEL, mesh)
  base = frozen_base(policy, setup)
  loader = make_loader(
    tiny.draw_sequences(30), batch_size=4, row_length=16, epochs=3
  )

  def fresh(policy):
    return init_state(jax.random.key(0), setup, policy)

  abstract = jax.eval_shape(fresh, tiny.draw_params())
  shardings = state_shardings(setup, abstract, mesh)
  losses = []
  with jax.set_mesh(mesh):
    state = jax.jit(fresh, out_shardings=shardings)(policy)
    # Equal to the bit is what users are promised, so that XLA generates code as
    # it does for them, and not as fast as for the other tests (conftest.py).
    step = make_train_step(setup, abstract, mesh)
    step = step.lower(state, base, shard_batch(loader.batch(0), mesh)).compile(
      compiler_options={"xla_cpu_use_fusion_emitters": True}
    )
    for index in range(3):
      batch = shard_batch(loader.batch(index), mesh)
      state, metrics = step(state, base, batch)
      losses.append(jax.device_get(metrics))
  on_host = {
    "moments": [memory.waits(x) for x in jax.tree.leaves(state.opt_state)],
    "reference": [memory.waits(x) for x in jax.tree.leaves(base["layers"])],
  }
  return losses, jax.device_get(state), on_host


@pytest.mark.parametrize(
  "offload, changes",
  [
    (("moments", "reference"), {}),
    slow(("moments",), {}),
    slow(("reference",), {}),
    slow(("moments", "reference"), {"grad_accum": 2}),
    slow(("moments",), {"critic_warmup": 0.5}),
    slow(("moments", "reference"), {"moment_dtype": "bfloat16"}),
  ],
)
def test_what_waits_on_the_host_changes_no_bit(offload, changes):
  losses, state, on_host = trained(offload, **changes)
  want_losses, want_state, nothing = trained((), **changes)
  tiny.assert_trees_close(losses, want_losses, rtol=0, atol=0)
  tiny.assert_trees_close(state, want_state, rtol=0, atol=0)
  assert losses[0]["loss"] != losses[2]["loss"]
  # Counters stay on the devices.
  assert any(on_host["moments"]) == ("moments" in offload)
  assert all(on_host["reference"]) == ("reference" in offload)
  assert not any(nothing["moments"] + nothing["reference"])


def test_moments_on_the_host_are_saved_and_restored(tmp_path):
  config = make(offload=("moments",))
  setup = make_setup(config, OBJECTIVES["rejection"], 10)
  state = init_state(jax.random.key(0), setup, tiny.draw_params())
  state = jax.tree.map(lambda x: x + 1, state)
  state = jax.device_put(state, state_shardings(setup, state, tiny.mesh()))
  mesh = tiny.mesh(fsdp=2)
  abstract = abstract_like(state, state_shardings(setup, state, mesh))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    restored = checkpoints.restore(abstract)
  tiny.assert_trees_close(restored, state, rtol=0, atol=0)
  assert memory.waits(restored.opt_state["policy"][1][0].mu["embedding"])


def test_a_base_below_adapters_cannot_wait_on_the_host():
  config = make("rejection", lora=True, offload=("reference",))
  setup = make_setup(config, OBJECTIVES["rejection"], num_steps=0)
  with pytest.raises(ConfigError, match="--config.train.offload=moments"):
    frozen_base(tiny.draw_params(), setup)


@pytest.mark.slow
def test_the_compiler_for_tpus_takes_what_waits_off_the_devices(tmp_path):
  pytest.importorskip("libtpu", reason="needs the TPU compiler: libtpu")
  model = preset(
    "tiny-qwen2",
    vocab_size=2048,
    embed_dim=512,
    num_layers=8,
    head_dim=128,
    mlp_dim=2048,
  )

  def compiled(*offload):
    config = maze_config()
    config.aot.topology = "v5e:4x4"
    config.mesh = MeshConfig(data=1, fsdp=16)
    config.model = dataclasses.replace(model, dtype="bfloat16", remat="full")
    config.train = dataclasses.replace(
      config.train, grad_accum=1, batch_size=16, offload=offload
    )
    with Progress(1, "aot", enabled=False) as progress:
      (answer,) = jobs.compile_all([config], tmp_path, progress=progress)
    assert answer["fits"], answer["message"]
    sizes = answer["memory"]
    return sizes, sizes["compiled_arguments"] + sizes["temporaries"]

  sizes, everything = compiled()
  arguments = sizes["arguments"]
  moments, reference = arguments["optimiser"], arguments["reference"]
  offloaded, without = compiled("moments")
  assert offloaded["on_host"] == pytest.approx(moments, abs=1e3)
  assert offloaded["compiled_arguments"] == pytest.approx(
    sizes["compiled_arguments"] - moments, rel=0.01
  )
  # The moments of a few weights are on a device at a time, and this model has
  # few.
  assert everything - without > moments / 2
  offloaded, without = compiled("reference")
  layers = offloaded["on_host"]
  assert 0.9 * reference < layers <= reference
  # A layer of eight is there while it is used, and the next is fetched.
  assert everything - without > layers / 2
