"""What is fixed during a training stage."""

import dataclasses

from oreo_jax.config import (
  Config,
  ConfigError,
  LoraConfig,
  ModelConfig,
  StageConfig,
  TrainConfig,
)
from oreo_jax.train.objective import Objective


@dataclasses.dataclass(frozen=True)
class Setup:
  """What is fixed during a stage; closed over by the jitted step.

  Which networks there are, and of what architecture, follows from this: see
  `roles`.
  """

  objective: Objective
  stage: StageConfig  # batches and optimiser; a TrainConfig beyond SFT
  model: ModelConfig  # of the base and the exports: without adapters
  lora: LoraConfig
  critic_kind: str  # separate | lora | shared
  num_steps: int  # of the whole stage: the schedules' length
  max_segments: int = 0  # most sequences of a row; 0: not known

  @property
  def train(self) -> TrainConfig:
    """The settings of the objectives beyond SFT."""
    if not isinstance(self.stage, TrainConfig):
      raise ValueError(f"objective {self.objective.name!r} needs config.train")
    return self.stage

  @property
  def frozen_steps(self) -> int:
    """Steps at the start in which only the value network moves."""
    if not (self.objective.needs_critic and self.objective.trains_policy):
      return 0
    return round(self.train.critic_warmup * self.num_steps)


def make_setup(
  config: Config, objective: Objective, num_steps: int, max_segments: int = 0
) -> Setup:
  """Reads from the config what a stage with this objective needs.

  Args:
    config: of the run.
    objective: of `objectives.OBJECTIVES`, or one of your own.
    num_steps: updates of the whole stage.
    max_segments: most sequences that a row of a batch holds; 0 if not known.

  Raises:
    ConfigError: if the reference is to be stored, and reads more than the data.
  """
  stored = objective.needs_reference and config.train.reference == "stored"
  if stored and not objective.trains_on_data:
    raise ConfigError(
      f"config.train.reference: expected 'online', since {objective.name!r} "
      "reads the reference on answers that are made for each batch, got "
      "'stored'; set --config.train.reference=online"
    )
  return Setup(
    objective=objective,
    stage=objective.stage(config),
    model=config.model,
    lora=config.lora,
    critic_kind=config.critic.kind,
    num_steps=num_steps,
    max_segments=max_segments,
  )
