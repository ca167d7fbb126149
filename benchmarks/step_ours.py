"""One side of `train_step.py`: the training step of oreo_jax."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from step_case import ALPHA, BETA, BETAS, CLIP, EPS, LR, Case, draw, make_batch

from oreo_jax import allocator, models, sharding, train
from oreo_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from oreo_jax.data.packing import Batch


def make(case: Case):
  """Returns (facts of this side, a function that does a step).

  The function returns the loss before the update.
  """
  config = Config(
    model=ModelConfig(
      vocab_size=case.vocab,
      embed_dim=case.width,
      num_layers=case.layers,
      num_heads=case.heads,
      num_kv_heads=case.kv_heads,
      head_dim=case.head_dim,
      mlp_dim=case.mlp,
      rope_theta=case.theta,
      norm_eps=case.eps,
    ),
    train=TrainConfig(
      batch_size=case.rows,
      beta=BETA,
      alpha=ALPHA,
      lr=LR,
      critic_lr=LR,
      b1=BETAS[0],
      b2=BETAS[1],
      eps=EPS,
      clip_norm=CLIP,
      warmup=0.0,
      schedule="constant",
    ),
  )
  config.validate()
  setup = train.make_setup(config, train.OBJECTIVES["oreo"], 1000, 1)
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  ref = draw_params(case, config.model, "reference")
  critic = draw_params(case, config.model, "critic")
  state = train.init_state(jax.random.key(0), setup, ref, critic)
  state.params["policy"] = draw_params(case, config.model, "policy")
  del critic
  arrays = make_batch(case)
  batch = Batch(
    **arrays,
    segment_ids=np.ones_like(arrays["tokens"]),
    decision_mask=arrays["action_mask"],
  )
  with jax.set_mesh(mesh):
    state = jax.device_put(state, train.state_shardings(setup, state, mesh))
    batch = sharding.shard_batch(batch, mesh)
    start = time.perf_counter()
    step = train.make_train_step(setup, state, mesh)
    compiled = step.lower(state, ref, batch).compile()
    compile_s = time.perf_counter() - start
  allocator.return_freed_memory()  # as `oreo train` does
  memory = compiled.memory_analysis()
  used = {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "shared_by_arguments_and_outputs": memory.alias_size_in_bytes,
  }
  used["peak"] = sum(used.values()) - 2 * memory.alias_size_in_bytes
  facts = {
    "parameters": models.count_params(ref),
    "library": f"jax {jax.__version__}",
    "compile_s": compile_s,
    "compiler_bytes": used,
  }

  def take_step() -> float:
    nonlocal state
    state, metrics = compiled(state, ref, batch)
    jax.block_until_ready((state, metrics))
    return float(metrics["loss"])

  return facts, take_step


def draw_params(case: Case, config: ModelConfig, role: str) -> models.Params:
  """Draws a network as the other side does, one tensor after another."""
  head = "value" if role == "critic" else "lm"
  kernels = case.kernels()

  def leaf(path, shape: jax.ShapeDtypeStruct) -> jax.Array:
    names = [part.key for part in path]
    if names[-1] == "scale":
      return jnp.ones(shape.shape, shape.dtype)
    # A layer's kernel is named after its projection, all else after itself.
    name = names[-2] if names[-1] == "kernel" else names[-1]
    size, fan_in = shape.shape, case.width
    if name in kernels:
      size, fan_in = (case.layers, *kernels[name]), kernels[name][0]
    return jnp.asarray(draw(role, name, size, fan_in**-0.5)).reshape(
      shape.shape
    )

  shapes = models.abstract_params(config, head=head)
  return jax.tree_util.tree_map_with_path(leaf, shapes)
