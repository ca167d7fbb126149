"""Stages whose networks stand on one frozen base, with adapters on top."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from oracles import tiny

from oreo_jax.config import Config, CriticConfig, LoraConfig, TrainConfig
from oreo_jax.train import OBJECTIVES, init_state, keep_trunk, make_setup
from oreo_jax.train.forward import forward

MODEL = dataclasses.replace(tiny.MODEL, num_layers=3)
ROWS = 8
ROW_LENGTH = 16


def make(objective="oreo", *, lora=True, critic="lora", last=1, **changes):
  settings = {"batch_size": ROWS, "lr": 0.1, "critic_lr": 0.1, "warmup": 0.0}
  config = Config(
    model=dataclasses.replace(MODEL),
    critic=CriticConfig(kind=critic),
    lora=LoraConfig(policy=lora, rank=2, alpha=4.0, last_layers=last),
    train=TrainConfig(objective=objective, **settings | changes),
  )
  config.validate()
  return make_setup(config, OBJECTIVES[objective], 4, max_segments=8)


def trained_state(setup, base):
  """A state as training leaves it: the last adapters' B is no longer zero."""
  state = init_state(jax.random.key(1), setup, base)
  rng = np.random.default_rng(0)

  def move(path, leaf):
    noise = jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
    if path[-1].key == "lora_b":
      first = len(leaf) - setup.lora.last_layers
      return leaf.at[first:].set(noise[first:])
    return noise if path[-1].key == "value_head" else leaf

  trees = state.params, state.averages
  return jax.tree_util.tree_map_with_path(move, trees)


def loss_and_gradient(setup, base, batch):
  """The loss of a host's batch and its gradient, in a state as trained."""
  params, averages = trained_state(setup, base)

  @jax.jit
  def run(params, base, batch):
    objective = setup.objective
    rows, totals = objective.prepare(params, base, batch, setup)

    def loss(params):
      out = forward(params, averages, base, rows, setup)
      return objective.loss(params, out, rows, totals, setup)[0]

    return jax.value_and_grad(loss)(params)

  return run(params, base, jax.tree.map(jnp.asarray, batch))


def keep(directory, *, sequences=None, base=None, setup=None, mesh=None):
  """Calls `keep_trunk`, by default with twelve sequences on one device."""
  mesh = mesh or tiny.mesh()
  with jax.set_mesh(mesh):
    return keep_trunk(
      tiny.draw_sequences(12) if sequences is None else sequences,
      tiny.draw_params(MODEL) if base is None else base,
      setup or make(),
      mesh=mesh,
      row_length=ROW_LENGTH,
      directory=directory,
    )
