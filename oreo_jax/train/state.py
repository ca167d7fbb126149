"""What a training stage carries from step to step, and how it is sharded."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from oreo_jax import memory, models
from oreo_jax.models import Params
from oreo_jax.sharding import replicated, shardings_of
from oreo_jax.train.roles import (
  ROLES,
  first_weights,
  master_copy,
  optimizers,
  roles_of,
)
from oreo_jax.train.setup import Setup


class TrainState(NamedTuple):
  """All that changes during training; donated to every step."""

  step: jax.Array  # i32[], updates done
  # What gradients move, by role. With adapters a tree holds the adapters
  # alone; `full_params` adds what lies beneath them. All of it is float32,
  # whatever dtype the base is held in.
  params: dict[str, Any]
  opt_state: dict[str, Any]  # of each tree of `params`
  averages: dict[str, Params]  # running means, by role; mostly empty


def init_state(
  key: jax.Array, setup: Setup, base: Params, critic: Params | None = None
) -> TrainState:
  """Makes the state of step 0. Pure: run it under `jit` with shardings.

  Args:
    key: for fresh adapters.
    setup: the stage's fixed part.
    base: the policy to start from; its arrays are copied, so that it may stay
      on as the reference.
    critic: a value network to go on with; by default one that starts as the
      base with a head of zeros (paper A.3).

  Returns:
    A TrainState; `full_params(state.params, base, setup)` gives whole models.
  """
  given = {} if critic is None else {"critic": critic}
  keys = dict(zip(ROLES, jax.random.split(key, len(ROLES)), strict=True))
  trained = optimizers(setup)
  params: dict[str, Any] = {}
  averages: dict[str, Params] = {}
  for role in roles_of(setup):
    if role.average_of:
      averages[role.name] = jax.tree.map(jnp.copy, params[role.average_of])
    elif role.name in given:
      if role.trunk(setup):
        raise ValueError(
          f"{role.name}: a network to go on with needs weights of its own, "
          f"not adapters or a head on {role.trunk(setup)!r}: set "
          "--config.critic.kind=separate"
        )
      params[role.name] = master_copy(given[role.name])
    elif role.name in trained:
      params[role.name] = first_weights(role, keys[role.name], setup, base)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state={name: trained[name].init(params[name]) for name in params},
    averages=averages,
  )


def state_shardings(setup: Setup, state: TrainState, mesh: Mesh) -> TrainState:
  """Returns the sharding of every leaf of an (abstract) state.

  Moments lie as their weights do, in the memory of the host with "moments"
  among `stage.offload`; counters are on every device.
  """
  everywhere: Any = replicated(mesh)

  def sharding_of(name: str, tree: Any) -> Any:
    role = ROLES[name]
    if not role.head:
      return everywhere
    axes = models.logical_axes(role.config(setup), head=role.head)
    return shardings_of(_select_like(tree, axes), tree, mesh)

  params = {name: sharding_of(name, t) for name, t in state.params.items()}

  def moments_of(name: str) -> Any:
    waiting = ROLES[name].head and "moments" in setup.stage.offload
    return memory.on_host(params[name]) if waiting else params[name]

  # An optimiser's state has a copy of the tree's structure a moment: optax
  # knows which of its leaves belong to which weight.
  opt_state = {
    name: optax.tree.map_params(
      optimizer,
      lambda _, sharding: sharding,
      state.opt_state[name],
      moments_of(name),
      transform_non_params=lambda _: everywhere,
    )
    for name, optimizer in optimizers(setup).items()
  }
  averages = {name: sharding_of(name, t) for name, t in state.averages.items()}
  return TrainState(everywhere, params, opt_state, averages)


def _select_like(tree: Params, axes: Params) -> Params:
  """Picks from `axes` the leaves that `tree` has."""
  return {
    key: _select_like(value, axes[key])
    if isinstance(value, dict)
    else axes[key]
    for key, value in tree.items()
  }
