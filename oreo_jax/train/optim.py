"""Optimisers and learning-rate schedules of the training stages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oreo_jax import memory
from oreo_jax.config import StageConfig, TrainConfig

# Matrices decay, norms and biases do not. Named, because stacking the layers
# gives a norm two dimensions as well.
_DECAYED = ("kernel", "embedding", "head", "lora_a", "lora_b")


def as_optax_expects(function: Callable) -> Callable:
  """Lets `function` of optax mix integer counts with floats.

  Our own arithmetic casts, and so runs under
  `jax_numpy_dtype_promotion="strict"` as well.
  """

  @functools.wraps(function)
  def call(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"):
      return function(*args, **kwargs)

  return call


def make_schedule(
  stage: StageConfig, lr: float, num_steps: int
) -> optax.Schedule:
  """Returns step -> learning rate: a linear warm-up, then the decay.

  Args:
    stage: `schedule`, `warmup` and `final_lr` are read.
    lr: the peak.
    num_steps: steps of the whole stage.
  """
  warmup_steps = round(stage.warmup * num_steps)
  decay_steps = max(num_steps - warmup_steps, 1)
  if stage.schedule == "cosine":
    decay = optax.cosine_decay_schedule(lr, decay_steps, stage.final_lr)
  elif stage.schedule == "linear":
    decay = optax.linear_schedule(lr, lr * stage.final_lr, decay_steps)
  else:
    decay = optax.constant_schedule(lr)
  if not warmup_steps:
    return as_optax_expects(decay)
  # The first update is not wasted on a rate of zero.
  warmup = optax.linear_schedule(lr / warmup_steps, lr, warmup_steps)
  return as_optax_expects(optax.join_schedules([warmup, decay], [warmup_steps]))


def make_optimizer(
  stage: StageConfig, lr: float, num_steps: int
) -> optax.GradientTransformation:
  """Returns AdamW behind a clip of the global norm (paper A.3).

  Policy and value network get one each: their gradients are clipped apart. The
  first moment is held in `stage.moment_dtype`.
  """
  clip = (
    optax.clip_by_global_norm(stage.clip_norm)
    if stage.clip_norm
    else optax.identity()
  )
  adamw = optax.chain(
    hold_moments(
      optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=stage.eps),
      jnp.dtype(stage.moment_dtype),
    ),
    optax.add_decayed_weights(stage.weight_decay, _decay_mask),
    optax.scale_by_learning_rate(make_schedule(stage, lr, num_steps)),
  )
  chain = optax.chain(clip, adamw)
  return chain._replace(update=as_optax_expects(chain.update))


def hold_moments(
  adam: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
  """Holds the moments of Adam between steps as they were given, one in `dtype`.

  The first moment is rounded once a step, after the update was made of it. The
  `mu_dtype` of optax would also compute in bfloat16, where b1=0.9 is 0.8984: of
  equal gradients the moment would be 1.5% too small.

  Moments that wait on the host are fetched and put back a weight at a time, so
  that those of few weights are on the devices at once.

  Args:
    adam: `optax.scale_by_adam`, which computes in float32.
    dtype: in which the state holds the first moment.
  """

  def init(params: Any) -> Any:
    state = adam.init(params)
    return state._replace(mu=optax.tree.cast(state.mu, dtype))

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    leaves, tree = jax.tree.flatten(grads)
    updates: list[jax.Array] = []
    means: list[jax.Array] = []
    squares: list[jax.Array] = []
    done, count = None, state.count
    for grad, mean, square in zip(
      leaves, jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True
    ):
      held = memory.fetch((mean, square), after=(grad, done))
      own = state._replace(mu=held[0].astype(jnp.float32), nu=held[1])
      change, new = adam.update(grad, own)
      count = new.count
      done = memory.put_back((new.mu.astype(dtype), new.nu), (mean, square))
      updates.append(change)
      means.append(done[0])
      squares.append(done[1])
    state = state._replace(
      count=count,
      mu=jax.tree.unflatten(tree, means),
      nu=jax.tree.unflatten(tree, squares),
    )
    return jax.tree.unflatten(tree, updates), state

  return optax.GradientTransformation(init, update)


def make_critic_optimizer(
  config: TrainConfig, num_steps: int
) -> optax.GradientTransformation:
  """Returns the value network's optimiser: its head may have its own rate."""
  optimizer = make_optimizer(config, config.critic_lr, num_steps)
  if not config.value_head_lr:
    return optimizer
  ratio = config.value_head_lr / config.critic_lr
  return optax.chain(optimizer, optax.masked(optax.scale(ratio), _head_mask))


def make_alpha_optimizer(lr: float) -> optax.GradientTransformation:
  """Returns the Adam that learns log(alpha)."""
  adam = optax.adam(lr)
  return adam._replace(update=as_optax_expects(adam.update))


def _decay_mask(params: Any) -> Any:
  return _mask(params, _DECAYED)


def _head_mask(params: Any) -> Any:
  return _mask(params, ("value_head",))


def _mask(params: Any, names: tuple[str, ...]) -> Any:
  """Returns the same tree with True where the leaf has one of the names."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in names, params
  )
