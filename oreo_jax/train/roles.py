"""The roles of a training stage: policy, value network, reference, and so on.

A role is a row of `ROLES`. Which parameters are made, trained, averaged,
sharded and saved follows from the rows; nothing else lists the networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.models import Params
from oreo_jax.train.optim import (
  make_alpha_optimizer,
  make_critic_optimizer,
  make_optimizer,
  make_schedule,
)
from oreo_jax.train.setup import Setup

# The trunk of a network whose weights below its own are the frozen base's.
BASE = "base"


@dataclasses.dataclass(frozen=True)
class Role:
  """A network of a stage, or a number that is learned beside the networks.

  Attributes:
    name: its key in `TrainState.params` or `TrainState.averages`.
    is_used: setup -> whether a stage has the role.
    head: "lm" for a vocabulary, "value" for a value; "" for a number.
    config: setup -> its architecture, adapters included.
    trunk: setup -> what lies beneath the weights it has of its own: `BASE`,
      another role, or "" if all its weights are its own.
    start: setup -> where a number starts; networks start as the base.
    optimizer: setup -> its optimiser, if gradients move it.
    learning_rate: (setup, step) -> its rate, for the records.
    waits: whether it rests while the value network warms up.
    average_of: the role whose running mean it is, if it is one.
    export: its name where the model is saved; "" if it is not.
  """

  name: str
  is_used: Callable[[Setup], bool]
  head: str = ""
  config: Callable[[Setup], ModelConfig] = lambda setup: setup.model
  trunk: Callable[[Setup], str] = lambda setup: ""
  start: Callable[[Setup], jax.Array] | None = None
  optimizer: Callable[[Setup], optax.GradientTransformation] | None = None
  learning_rate: Callable[[Setup, jax.Array], jax.Array] | None = None
  waits: bool = False
  average_of: str = ""
  export: str = ""


def _with_adapters(setup: Setup) -> ModelConfig:
  return dataclasses.replace(
    setup.model,
    lora_rank=setup.lora.rank,
    lora_alpha=setup.lora.alpha,
    lora_targets=setup.lora.targets,
    lora_layers=setup.lora.last_layers,
  )


def _policy_config(setup: Setup) -> ModelConfig:
  return _with_adapters(setup) if setup.lora.policy else setup.model


def _policy_trunk(setup: Setup) -> str:
  return BASE if setup.lora.policy else ""


def _policy_optimizer(setup: Setup) -> optax.GradientTransformation:
  # The schedule, warm-up included, starts when the policy starts to move.
  moving = setup.num_steps - setup.frozen_steps
  return make_optimizer(setup.stage, setup.stage.lr, moving)


def _policy_rate(setup: Setup, step: jax.Array) -> jax.Array:
  frozen = setup.frozen_steps
  schedule = make_schedule(
    setup.stage, setup.stage.lr, setup.num_steps - frozen
  )
  return jnp.where(step < frozen, 0.0, schedule(step - frozen))


def _critic_config(setup: Setup) -> ModelConfig:
  if setup.critic_kind == "lora":
    return _with_adapters(setup)
  if _critic_trunk(setup) == "policy":
    return _policy_config(setup)
  return setup.model


def _critic_trunk(setup: Setup) -> str:
  if setup.critic_kind == "separate":
    return ""
  if setup.critic_kind == "shared" and setup.objective.trains_policy:
    return "policy"
  return BASE


def _critic_optimizer(setup: Setup) -> optax.GradientTransformation:
  return make_critic_optimizer(setup.train, setup.num_steps)


def _critic_rate(setup: Setup, step: jax.Array) -> jax.Array:
  rate = setup.train.critic_lr
  return make_schedule(setup.stage, rate, setup.num_steps)(step)


def _trains(name: str) -> Callable[[Setup], bool]:
  return lambda setup: name in setup.objective.trains


# In an order in which a role comes after the one that is its trunk.
ROLES: dict[str, Role] = {
  role.name: role
  for role in (
    Role(
      "policy",
      is_used=_trains("policy"),
      head="lm",
      config=_policy_config,
      trunk=_policy_trunk,
      optimizer=_policy_optimizer,
      learning_rate=_policy_rate,
      waits=True,
      export="policy",
    ),
    Role(
      "critic",
      is_used=_trains("critic"),
      head="value",
      config=_critic_config,
      trunk=_critic_trunk,
      optimizer=_critic_optimizer,
      learning_rate=_critic_rate,
      export="value",
    ),
    # The base as it is: an argument of the step, so never made or donated.
    Role(
      "reference",
      is_used=lambda setup: (
        setup.objective.needs_reference and setup.train.reference == "online"
      ),
      head="lm",
      trunk=lambda setup: BASE,
    ),
    # Supplies the log-ratios of the value loss when ema_decay > 0.
    Role(
      "target",
      is_used=lambda setup: (
        "target" in setup.objective.reads and setup.train.ema_decay > 0
      ),
      head="lm",
      config=_policy_config,
      trunk=_policy_trunk,
      average_of="policy",
    ),
    # Learned to hold the KL at kl_target. It waits with the policy, or it
    # would chase the target of a KL that stays zero.
    Role(
      "log_alpha",
      is_used=lambda setup: (
        "log_alpha" in setup.objective.trains and setup.train.kl_target > 0
      ),
      start=lambda setup: jnp.log(jnp.float32(setup.train.alpha)),
      optimizer=lambda setup: make_alpha_optimizer(setup.train.alpha_lr),
      waits=True,
    ),
  )
}


def roles_of(setup: Setup) -> list[Role]:
  """Returns the roles that a stage has, a trunk before what stands on it."""
  return [role for role in ROLES.values() if role.is_used(setup)]


def needs_base(setup: Setup) -> bool:
  """Returns whether a step reads the frozen base: as reference or trunk."""
  return any(role.trunk(setup) == BASE for role in roles_of(setup))


def trunk_depth(setup: Setup) -> int:
  """Returns how many first layers all networks that stand on the base share.

  With adapters in the last layers alone, the layers below them are the base's
  in all those networks, and say the same of a batch. 0: nothing is shared.
  """
  adapted = any(
    role.trunk(setup) == BASE and role.config(setup).lora_rank
    for role in roles_of(setup)
  )
  last = setup.lora.last_layers
  return setup.model.num_layers - last if adapted and last else 0


def first_weights(
  role: Role, key: jax.Array, setup: Setup, base: Params
) -> Params | jax.Array:
  """Returns what a role has of its own before the first step.

  The arrays are copies, as the base stays on as the reference. They are
  float32 whatever the base is.

  Args:
    role: a row of `ROLES`.
    key: for fresh adapters.
    setup: the stage's fixed part.
    base: the policy that the stage starts from.
  """
  if role.start is not None:
    return role.start(setup)
  config, trunk = role.config(setup), role.trunk(setup)
  network = models.value_params(base, config) if role.head == "value" else base
  if trunk == BASE and config.lora_rank:
    network = models.add_adapters(key, network, config)
  if trunk:
    network = models.split_adapters(network)[1]
  return master_copy(network)


def master_copy(weights: Params) -> Params:
  """Returns the float32 copy of weights that an optimiser can move.

  Next to a weight of size 0.1, bfloat16 cannot hold an update below 2e-4: at
  the paper's rate of 5e-6 nearly every update would be rounded away. The
  networks cast to their compute dtype where they use the weights.
  """
  return jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), weights)


def full_params(
  params: Mapping[str, Any], base: Params | None, setup: Setup
) -> dict[str, Params]:
  """Returns the networks of a stage, with what lies beneath their weights.

  Args:
    params: `TrainState.params`; `TrainState.averages` may be among them.
    base: the frozen base; read only where `needs_base(setup)`, and shared,
      never copied.
    setup: the stage's fixed part.

  Returns:
    The parameters by role: of "policy" if it is trained, of "critic" if there
    is a value network.
  """
  full: dict[str, Params] = {}
  for role in roles_of(setup):
    if not role.head or role.name not in params:
      continue
    weights, trunk = params[role.name], role.trunk(setup)
    if trunk:
      beneath = base if trunk == BASE else full[trunk]
      if beneath is None:
        raise ValueError(
          f"base: the {role.name} stands on the frozen base, got None"
        )
      weights = models.join_adapters(beneath, weights)
    full[role.name] = weights
  return full


def full_configs(setup: Setup) -> dict[str, ModelConfig]:
  """Returns the architectures of the networks by role, adapters included."""
  return {
    role.name: role.config(setup) for role in roles_of(setup) if role.head
  }


def plain_models(
  full: Mapping[str, Params], setup: Setup
) -> tuple[dict[str, Params], ModelConfig]:
  """Returns the models of `full_params` as they are saved.

  Args:
    full: parameters by role.
    setup: the stage's fixed part.

  Returns:
    (params by role, config) of the roles that are exported: adapters merged,
    the weights in `param_dtype`.
  """
  plain = {}
  for name, params in full.items():
    role = ROLES[name]
    if role.export:
      # A base that is held in bfloat16 must not round what adapters add to it.
      merged, _ = models.merge_adapters(
        params, role.config(setup), setup.model.param_dtype
      )
      shapes = models.abstract_params(setup.model, head=role.head)
      plain[name] = jax.tree.map(
        lambda x, shape: x.astype(shape.dtype), merged, shapes
      )
  return plain, setup.model


def optimizers(setup: Setup) -> dict[str, optax.GradientTransformation]:
  """Returns the optimiser of each tree of `TrainState.params`."""
  return {
    role.name: role.optimizer(setup)
    for role in roles_of(setup)
    if role.optimizer is not None
  }


def learning_rates(setup: Setup, step: jax.Array) -> dict[str, jax.Array]:
  """Returns the rates in force at a step, f32[] each, for the records."""
  return {
    f"lr/{role.name}": jnp.asarray(role.learning_rate(setup, step), jnp.float32)
    for role in roles_of(setup)
    if role.learning_rate is not None
  }
