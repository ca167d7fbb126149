"""The frozen base as a step holds it: in which dtype, and in whose memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from oreo_jax import memory
from oreo_jax.config import ConfigError, TrainConfig
from oreo_jax.models import Params
from oreo_jax.train.roles import BASE, needs_base, roles_of
from oreo_jax.train.setup import Setup


def is_policy(setup: Setup) -> bool:
  """Returns whether `frozen_base` is the policy as it is, the arrays shared."""
  return not (_rounds(setup) or _waits(setup))


def frozen_base(policy: Params, setup: Setup) -> Params:
  """Returns the frozen base of a step.

  It has `train.reference_dtype`. With "reference" among `train.offload` its
  layers are in the memory of the host; embedding and output head, which the
  losses need, stay on the devices.

  Args:
    policy: that the stage starts from: arrays on a mesh, or abstract ones with
      shardings.
    setup: the stage's fixed part.

  Raises:
    ConfigError: if a network that is trained stands on a base that is to wait
      on the host: it needs the base all the time.
  """
  base = policy
  if _rounds(setup):
    dtype = jnp.dtype(setup.train.reference_dtype)
    base = jax.tree.map(lambda x: _cast(x, dtype), base)
  if _waits(setup):
    base = {**base, "layers": jax.tree.map(_to_host, base["layers"])}
  return base


def _rounds(setup: Setup) -> bool:
  if not isinstance(setup.stage, TrainConfig) or not needs_base(setup):
    return False
  held = setup.stage.reference_dtype
  return held not in ("param_dtype", setup.model.param_dtype)


def _waits(setup: Setup) -> bool:
  if "reference" not in setup.stage.offload or not needs_base(setup):
    return False
  for role in roles_of(setup):
    if role.name != "reference" and role.trunk(setup) == BASE:
      raise ConfigError(
        "config.train.offload: expected 'moments' alone, since the "
        f"{role.name} stands on the frozen base, which a step needs from its "
        "start to its end, got 'reference' too; set "
        "--config.train.offload=moments"
      )
  return True


def _cast(x: Any, dtype: jnp.dtype) -> Any:
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
  return x.astype(dtype)


def _to_host(x: Any) -> Any:
  sharding = memory.on_host(x.sharding)
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.device_put(x, sharding)
