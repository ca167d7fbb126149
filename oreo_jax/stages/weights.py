"""Weights in a stage's folder: `model/<role>`, an Orbax checkpoint a role."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from oreo_jax import models
from oreo_jax.config import ModelConfig, computed_like, from_dict
from oreo_jax.models import Params
from oreo_jax.sharding import shardings_of
from oreo_jax.train.checkpoint import Checkpoints, abstract_like
from oreo_jax.train.roles import ROLES


def save_models(
  folder: pathlib.Path,
  step: int,
  models_by_role: Mapping[str, Params],
  config: ModelConfig,
) -> None:
  """Saves whole weights, so that any of them can be read without the others.

  Args:
    folder: of the stage.
    step: of training, the number of the checkpoint.
    models_by_role: parameters by role of `train.roles.ROLES`.
    config: the architecture of all of them.
  """
  for role, params in models_by_role.items():
    with Checkpoints(folder / "model" / role, keep=1) as checkpoints:
      checkpoints.save(step, params, {"model": dataclasses.asdict(config)})


def saved_roles(folder: pathlib.Path) -> list[str]:
  """Returns the roles whose models a stage saved."""
  return sorted(p.name for p in (folder / "model").iterdir() if p.is_dir())


def load_model(
  folder: pathlib.Path, role: str, ours: ModelConfig, mesh: Mesh
) -> tuple[Params, ModelConfig]:
  """Reads one model, straight into its shards.

  Args:
    folder: of the stage that saved it.
    role: of `train.roles.ROLES`.
    ours: how to compute is this run's business (dtype, remat, attention,
      unroll); what to compute is the weights'.
    mesh: the device mesh.

  Returns:
    The parameters and their architecture.
  """
  with Checkpoints(folder / "model" / role, keep=1) as checkpoints:
    saved = from_dict(checkpoints.record()["model"], ModelConfig, "model")
    # What is saved has a dtype already.
    ours = dataclasses.replace(ours, param_dtype=saved.param_dtype)
    config = computed_like(ours, saved)
    head = ROLES[role].head
    shapes = models.abstract_params(config, head=head)
    axes = models.logical_axes(config, head=head)
    shardings = shardings_of(axes, shapes, mesh)
    return checkpoints.restore(abstract_like(shapes, shardings)), config


def random_policy(config: ModelConfig, seed: int, mesh: Mesh) -> Params:
  """Draws a policy, every weight on the devices that hold it."""
  axes = models.logical_axes(config)
  shardings = shardings_of(axes, models.abstract_params(config), mesh)
  draw = jax.jit(models.init, static_argnames="config", out_shardings=shardings)
  return draw(jax.random.key(seed), config=config)
