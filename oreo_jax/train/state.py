"""What a training stage carries from step to step, and how it is sharded."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from oreo_jax import models
from oreo_jax.config import Config, ModelConfig, StageConfig, TrainConfig
from oreo_jax.models import Params
from oreo_jax.sharding import replicated, shardings_of
from oreo_jax.train.optim import (
  make_alpha_optimizer,
  make_critic_optimizer,
  make_optimizer,
  make_schedule,
)


class TrainState(NamedTuple):
  """All that changes during training; donated to every step."""

  step: jax.Array  # i32[], updates done
  # What is trained: by objective "policy", "critic" and "log_alpha". With
  # adapters a tree holds the adapters alone; `full_params` adds the base.
  params: dict[str, Any]
  opt_state: dict[str, Any]  # of each tree of `params`
  ema: Params | None  # running mean of the policy, when ema_decay > 0


@dataclasses.dataclass(frozen=True)
class Setup:
  """What is fixed during a stage; closed over by the jitted step."""

  objective: str  # a key of objectives.OBJECTIVES
  stage: StageConfig  # batches and optimiser; a TrainConfig beyond SFT
  policy: ModelConfig
  critic: ModelConfig | None  # None: no value network
  critic_kind: str  # separate | lora | shared
  num_steps: int  # of the whole stage: the schedules' length
  max_segments: int = 0  # most sequences of a row; 0: not known

  @property
  def trains_policy(self) -> bool:
    """Whether the policy is trained; if not, it is the base itself."""
    return self.objective != "value"

  @property
  def builds_on_base(self) -> bool:
    """Whether a network of the stage is the frozen base and a little more."""
    if self.critic is not None and self.critic_kind != "separate":
      if self.critic_kind == "lora" or not self.trains_policy:
        return True
    return bool(self.policy.lora_rank)

  @property
  def train(self) -> TrainConfig:
    """The settings of the objectives beyond SFT."""
    if not isinstance(self.stage, TrainConfig):
      raise ValueError(f"objective {self.objective!r} needs config.train")
    return self.stage

  def optimizers(self) -> dict[str, optax.GradientTransformation]:
    """Returns the optimiser of each tree of `TrainState.params`."""
    stage, steps = self.stage, self.num_steps
    found = {}
    if self.trains_policy:
      moving = steps - self.frozen_steps
      found["policy"] = make_optimizer(stage, stage.lr, moving)
    if self.critic is not None:
      found["critic"] = make_critic_optimizer(self.train, steps)
    if self.learns_alpha:
      found["log_alpha"] = make_alpha_optimizer(self.train.alpha_lr)
    return found

  @property
  def frozen_steps(self) -> int:
    """Steps at the start in which only the value network moves."""
    if self.critic is None or not self.trains_policy:
      return 0
    return round(self.train.critic_warmup * self.num_steps)

  @property
  def learns_alpha(self) -> bool:
    """Whether alpha follows a KL target."""
    return self.objective == "oreo" and self.train.kl_target > 0

  def learning_rates(self, step: jax.Array) -> dict[str, jax.Array]:
    """Returns the rates in force at `step`, for the records."""
    stage, steps = self.stage, self.num_steps
    rates = {}
    if self.trains_policy:
      # Its schedule, warm-up included, starts when it starts to move.
      frozen = self.frozen_steps
      rate = make_schedule(stage, stage.lr, steps - frozen)(step - frozen)
      rates["lr/policy"] = jnp.where(step < frozen, 0.0, rate)
    if self.critic is not None:
      critic = make_schedule(stage, self.train.critic_lr, steps)
      rates["lr/critic"] = critic(step)
    return {k: jnp.asarray(v, jnp.float32) for k, v in rates.items()}


def make_setup(
  config: Config, objective: str, num_steps: int, max_segments: int = 0
) -> Setup:
  """Reads from the config what a stage with this objective needs."""
  stage = config.sft if objective == "sft" else config.train
  adapters = {
    "lora_rank": config.lora.rank,
    "lora_alpha": config.lora.alpha,
    "lora_targets": config.lora.targets,
    "lora_layers": config.lora.last_layers,
  }
  policy = config.model
  if config.lora.policy and objective != "value":
    policy = dataclasses.replace(policy, **adapters)
  critic = None
  if objective in ("oreo", "value", "dqo"):
    critic = config.model
    if config.critic.kind == "lora":
      critic = dataclasses.replace(critic, **adapters)
  return Setup(
    objective,
    stage,
    policy,
    critic,
    config.critic.kind,
    num_steps,
    max_segments,
  )


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
  policy_key, critic_key = jax.random.split(key)
  params = {}
  if setup.policy.lora_rank:
    params["policy"] = _fresh_adapters(policy_key, base, setup.policy)
  elif setup.trains_policy:
    params["policy"] = jax.tree.map(jnp.copy, base)
  if setup.critic is not None:
    if critic is not None:
      params["critic"] = jax.tree.map(jnp.copy, critic)
    elif setup.critic_kind == "separate":
      params["critic"] = models.value_params(base, setup.critic)
    elif setup.critic_kind == "lora":
      adapters = _fresh_adapters(critic_key, base, setup.critic)
      params["critic"] = {**adapters, "value_head": _zero_head(setup.critic)}
    else:
      params["critic"] = {"value_head": _zero_head(setup.critic)}
  if setup.learns_alpha:
    params["log_alpha"] = jnp.log(jnp.float32(setup.train.alpha))
  optimizers = setup.optimizers()
  ema = None
  if setup.objective == "oreo" and setup.train.ema_decay:
    ema = jax.tree.map(jnp.copy, params["policy"])
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state={k: optimizers[k].init(params[k]) for k in params},
    ema=ema,
  )


def state_shardings(setup: Setup, state: TrainState, mesh: Mesh) -> TrainState:
  """Returns the sharding of every leaf of an (abstract) state.

  Moments lie as their weights do; counters are on every device.
  """
  axes = {"policy": models.logical_axes(setup.policy)}
  if setup.critic is not None:
    axes["critic"] = models.logical_axes(setup.critic, head="value")
  whole = replicated(mesh)
  params = {
    name: shardings_of(_like(tree, axes[name]), tree, mesh)
    if name in axes
    else whole
    for name, tree in state.params.items()
  }
  optimizers = setup.optimizers()
  opt_state = {
    name: optax.tree.map_params(
      optimizers[name],
      lambda _, sharding: sharding,
      state.opt_state[name],
      params[name],
      transform_non_params=lambda _: whole,
    )
    for name in state.params
  }
  ema = None if state.ema is None else params["policy"]
  return TrainState(whole, params, opt_state, ema)


def full_params(
  params: dict[str, Any], base: Params | None, setup: Setup
) -> dict[str, Params]:
  """Returns the whole models, with the frozen base under the adapters.

  Args:
    params: `TrainState.params`.
    base: the reference; read only where `setup.builds_on_base`, and shared,
      never copied.
    setup: the stage's fixed part.

  Returns:
    {"policy": params} if the policy is trained, and {"critic": params} if
    there is a value network.
  """
  policy, full = base, {}
  if setup.trains_policy:
    policy = params["policy"]
    if setup.policy.lora_rank:
      policy = models.join_adapters(base, policy)
    full["policy"] = policy
  if setup.critic is None:
    return full
  critic = params["critic"]
  if setup.critic_kind != "separate":
    trunk = base if setup.critic_kind == "lora" else policy
    critic = models.join_adapters(trunk, critic)
  return {**full, "critic": critic}


def full_configs(setup: Setup) -> dict[str, ModelConfig]:
  """Returns the architectures of `full_params`, adapters included."""
  configs = {"policy": setup.policy, "critic": setup.policy}
  if setup.critic is not None and setup.critic_kind == "lora":
    configs["critic"] = setup.critic
  return configs


def plain_models(
  full: dict[str, Params], setup: Setup
) -> tuple[dict[str, Params], ModelConfig]:
  """Returns the models of `full_params` with adapters merged, to be saved."""
  adapted = full_configs(setup)
  plain = {}
  for role, params in full.items():
    plain[role], config = models.merge_adapters(params, adapted[role])
  return plain, config


def _fresh_adapters(
  key: jax.Array, base: Params, config: ModelConfig
) -> Params:
  return models.split_adapters(models.add_adapters(key, base, config))[1]


def _zero_head(config: ModelConfig) -> jax.Array:
  return jnp.zeros((config.embed_dim, 1), jnp.float32)


def _like(tree: Params, axes: Params) -> Params:
  """Picks from `axes` the leaves that `tree` has."""
  return {
    key: _like(value, axes[key]) if isinstance(value, dict) else axes[key]
    for key, value in tree.items()
  }
