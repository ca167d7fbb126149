"""The table of objectives; a new one is a module here and a row below."""

from oreo_jax.config import ConfigError
from oreo_jax.train.objective import Method, Objective
from oreo_jax.train.objectives.dqo import DQO
from oreo_jax.train.objectives.kto import KTO
from oreo_jax.train.objectives.oreo import OREO, VALUE
from oreo_jax.train.objectives.preference import DPO
from oreo_jax.train.objectives.supervised import REJECTION, SFT

OBJECTIVES: dict[str, Objective] = {
  objective.name: objective
  for objective in (SFT, REJECTION, OREO, VALUE, DQO, DPO, KTO)
}

# What `oreo compare` can put in its table, by name.
METHODS: dict[str, Method] = {
  method.name: method
  for objective in OBJECTIVES.values()
  for method in objective.methods
}


def get_objective(name: str, flag: str = "train.objective") -> Objective:
  """Returns the objective of that name.

  Args:
    name: what the flag said.
    flag: which setting it is from, for the message.

  Raises:
    ConfigError: if there is none of that name among those that train on
      trajectories.
  """
  known = [k for k, row in OBJECTIVES.items() if row.section == "train"]
  if name not in known:
    raise ConfigError(
      f"config.{flag}={name!r} is unknown: set --config.{flag} to one of "
      + ", ".join(known)
    )
  return OBJECTIVES[name]


def get_method(name: str, flag: str = "compare.methods") -> Method:
  """Returns the row of `oreo compare` of that name.

  Raises:
    ConfigError: if there is none.
  """
  if name not in METHODS:
    raise ConfigError(
      f"config.{flag} names {name!r}: set --config.{flag} to some of "
      + ", ".join(METHODS)
    )
  return METHODS[name]
