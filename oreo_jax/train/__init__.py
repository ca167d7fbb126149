"""Training: state, one pure step, and the loop around it."""

from oreo_jax.train.loop import DivergedError, PreemptedError, fit
from oreo_jax.train.state import (
  Setup,
  TrainState,
  full_configs,
  full_params,
  init_state,
  make_setup,
  plain_models,
  state_shardings,
)
from oreo_jax.train.step import make_train_step, train_step

__all__ = [
  "DivergedError",
  "PreemptedError",
  "Setup",
  "TrainState",
  "fit",
  "full_configs",
  "full_params",
  "init_state",
  "make_setup",
  "make_train_step",
  "plain_models",
  "state_shardings",
  "train_step",
]
