"""Training: state, one pure step, and the loop around it."""

from oreo_jax.train.frozen import frozen_base
from oreo_jax.train.loop import DivergedError, PreemptedError, fit
from oreo_jax.train.objective import Method, Objective
from oreo_jax.train.objectives import (
  METHODS,
  OBJECTIVES,
  get_method,
  get_objective,
)
from oreo_jax.train.roles import full_configs, full_params, plain_models
from oreo_jax.train.setup import Setup, make_setup
from oreo_jax.train.state import TrainState, init_state, state_shardings
from oreo_jax.train.step import make_train_step, train_step
from oreo_jax.train.trunk import keep_trunk

__all__ = [
  "METHODS",
  "OBJECTIVES",
  "DivergedError",
  "Method",
  "Objective",
  "PreemptedError",
  "Setup",
  "TrainState",
  "fit",
  "frozen_base",
  "full_configs",
  "full_params",
  "get_method",
  "get_objective",
  "init_state",
  "keep_trunk",
  "make_setup",
  "make_train_step",
  "plain_models",
  "state_shardings",
  "train_step",
]
