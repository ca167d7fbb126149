"""Fitting networks to sequences: what the stages `sft` and `train` share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from oreo_jax import data, models, scoring, train
from oreo_jax.analysis.values import value_aucs
from oreo_jax.config import Config, StageConfig, TrainConfig
from oreo_jax.metrics import FILE_NAME, read_metrics
from oreo_jax.models import Params
from oreo_jax.sharding import process_rows
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train import Objective, Setup, TrainState
from oreo_jax.train.forward import forward
from oreo_jax.train.frozen import is_policy
from oreo_jax.train.roles import ROLES


class Fitted(NamedTuple):
  """What came of a fit."""

  steps: int
  sequences: int  # trained on, an epoch
  dropped: int  # left out because they do not fit a row
  held_out: dict[str, float]  # figures on held-out problems; empty without any


def fit(
  workspace: Workspace,
  objective: Objective,
  sequences: Sequence[Any],
  load: Callable[[], Params],
  held_out: Sequence[data.Tokenized] = (),
) -> Fitted:
  """Trains the networks of an objective and saves them in its folder.

  Args:
    workspace: settings and folder.
    objective: of `train.OBJECTIVES`; its name is that of the folder.
    sequences: what the loader packs.
    load: returns the policy to start from, which is the reference. It is called
      once more where the reference is held in another dtype or place.
    held_out: tokenised trajectories of held-out problems, on which a value
      network is measured.
  """
  config = objective.fit_rows(workspace.config)
  stage, name = objective.stage(config), objective.name
  folder = workspace.path(name)
  networks = train.make_setup(config, objective, num_steps=0)
  base = train.frozen_base(load(), networks)
  if objective.needs_reference and config.train.reference == "stored":
    sequences = scoring.store_reference(
      sequences,
      base,
      config.model,
      workspace.mesh,
      row_length=config.data.row_length,
      batch_size=stage.batch_size // stage.grad_accum,
      chunk_size=stage.loss_chunk,
      vocab_chunk=stage.loss_vocab_chunk,
    )
  if isinstance(stage, TrainConfig) and stage.keep_trunk:
    sequences = train.keep_trunk(
      sequences,
      base,
      networks,
      mesh=workspace.mesh,
      row_length=config.data.row_length,
      directory=folder / "trunk",
    )
  loader = make_loader(config, objective, sequences, workspace.mesh)
  steps = num_updates(stage, loader)
  setup = train.make_setup(config, objective, steps, loader.max_segments)
  logging.info(
    "%s: %d sequences, %d steps of %d rows, rows %.0f%% full",
    name,
    loader.num_sequences,
    steps,
    stage.batch_size,
    100 * loader.fill(),
  )
  measure = None
  if held_out and objective.needs_critic:
    measure = held_out_measure(held_out, setup, config, workspace.mesh)
  state = train.fit(
    base,
    loader,
    setup,
    mesh=workspace.mesh,
    directory=folder,
    seed=config.seed,
    start=None if is_policy(setup) else load,
    description=name,
    measure=measure,
  )
  full = train.full_params(state.params, base, setup)
  figures: dict[str, float] = {}
  if measure is not None and workspace.is_chief:
    # The loop measured after its last step: to look again would cost as much.
    last = read_metrics(folder / FILE_NAME)[-1]
    figures = {k: v for k, v in last.items() if "heldout/" in k}
  workspace.save_models(name, steps, *train.plain_models(full, setup))
  for role, architecture in train.full_configs(setup).items():
    if role in full and architecture.lora_rank:
      models.save_adapter(
        folder / "adapters" / ROLES[role].export,
        full[role],
        architecture,
        base=workspace.base_name(),
        overwrite=True,
      )
  return Fitted(steps, len(sequences), loader.dropped, figures)


def make_loader(
  config: Config, objective: Objective, sequences: Sequence[Any], mesh: Mesh
) -> data.Loader:
  """Makes the loader of a training stage, this process's rows of it."""
  stage = objective.stage(config)

  def load(epochs: float) -> data.Loader:
    return _load(config, stage, sequences, mesh, epochs)

  loader = load(stage.epochs)
  if stage.updates > loader.num_steps:
    # Packing differs a little from epoch to epoch: one more is enough.
    loader = load(math.ceil(stage.updates / loader.steps_in(0)) + 1)
  return loader


def num_updates(stage: StageConfig, loader: data.Loader) -> int:
  """Returns how many updates a stage makes."""
  updates = stage.updates or loader.num_steps
  return min(updates, loader.num_steps, stage.max_steps or updates)


def _load(
  config: Config,
  stage: StageConfig,
  sequences: Sequence[Any],
  mesh: Mesh,
  epochs: float,
) -> data.Loader:
  process_index, process_count = process_rows(mesh)
  return data.make_loader(
    sequences,
    batch_size=stage.batch_size,
    row_length=config.data.row_length,
    seed=stage.seed,
    epochs=epochs,
    process_index=process_index,
    process_count=process_count,
    on_long=config.data.on_long,
  )


def tokenize(
  workspace: Workspace,
  trajectories: Sequence[data.Trajectory],
  granularity: str = "token",
  skipped: Counter[str] | None = None,
) -> list[data.Tokenized]:
  """Tokenises trajectories as `config.data` says.

  Args:
    workspace: settings and codec.
    trajectories: to tokenise.
    granularity: what one action is.
    skipped: takes the number of those that were left out, by kind.
  """
  settings = workspace.config.data
  return workspace.codec.tokenize(
    trajectories,
    granularity=granularity,
    max_length=settings.max_length or settings.row_length + 1,
    on_error=settings.on_error,
    on_long=settings.on_long,
    skipped=skipped,
  )


def held_out_measure(
  sequences: Sequence[data.Tokenized],
  setup: Setup,
  config: Config,
  mesh: Mesh,
) -> Callable[[TrainState, Params], dict[str, float]]:
  """Makes the function that judges a value network on held-out problems.

  The value of an answer is read at its last decision point, the latest state
  that the value network is trained at.

  Returns:
    (state, base) -> {"heldout/pooled_auc", "heldout/within_problem_auc"}. It
    raises FloatingPointError when a value is not finite.
  """
  stage = setup.stage

  def networks(
    params: dict[str, Any], base: Params, batch: data.Batch
  ) -> dict[str, jax.Array]:
    values = forward(params, None, base, batch, setup).values
    return {} if values is None else {"values": values}

  scorer = scoring.Scorer(
    sequences,
    networks,
    mesh,
    row_length=config.data.row_length,
    batch_size=max(stage.batch_size // stage.grad_accum, 1),
  )
  last = [np.flatnonzero(s.decision_mask[s.action_mask])[-1] for s in sequences]
  labels = np.array([s.rewards.sum() > 0.5 for s in sequences])
  problems = [s.problem for s in sequences]

  def measure(state: TrainState, base: Params) -> dict[str, float]:
    scores = scorer(state.params, base)
    latest = [s["values"][at] for s, at in zip(scores, last, strict=True)]
    if not np.isfinite(latest).all():
      raise FloatingPointError("a value of a held-out answer is not finite")
    return value_aucs(np.array(latest), labels, problems)

  return measure
