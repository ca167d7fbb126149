"""What an objective is: the class whose instances `objectives` lists.

A training stage holds its `Objective` and asks it for everything that differs
between OREO and the baselines: the loss, the networks, the data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from oreo_jax.config import Config, MethodConfig, StageConfig
from oreo_jax.data.loader import Loader
from oreo_jax.data.packing import Batch

Metrics = dict[str, jax.Array]


class Rows(NamedTuple):
  """A batch that is ready to be divided into micro-batches."""

  batch: Batch
  # What the loss of a micro-batch has to know of the whole batch: the numbers
  # that its sums are divided by, for one. The objective alone looks inside.
  totals: Any


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the table of `oreo compare`: an objective with its settings.

  The rates reach from where the paper's lie relative to OREO's, and further
  down where a small model came apart.

  Attributes:
    name: of its folder, and of its section in `config.compare`.
    label: its name in tables and plots.
    colour: its colour in plots, a key of `report.style.COLOURS`.
    objective: the name of its objective.
    granularity: as `train.granularity`.
    beta: as `train.beta`.
    alpha: as `train.alpha`.
    lr_scale: its rate in `oreo run`, in multiples of `train.lr`.
    lr_scales: multiples of `train.lr` that `oreo compare` tries.
    epochs: passes over its data; 0 makes as many updates as the objective that
      the run is about.
  """

  name: str
  label: str
  colour: str
  objective: str
  granularity: str = "token"
  beta: float = 0.03
  alpha: float = 0.01
  lr_scale: float = 1.0
  lr_scales: tuple[float, ...] = (0.3, 1.0, 3.0)
  epochs: float = 0.0

  def given(self, config: Config) -> Method:
    """Returns the row with what its section in `config.compare` says."""
    own = getattr(config.compare, self.name, None) or MethodConfig()
    return dataclasses.replace(
      self,
      beta=own.beta or self.beta,
      alpha=self.alpha if own.alpha < 0 else own.alpha,
      lr_scale=own.lr_scale or self.lr_scale,
      lr_scales=own.lr_scales or self.lr_scales,
      epochs=own.epochs or self.epochs,
    )

  def configure(self, config: Config, *, lr: float, updates: int) -> Config:
    """Returns the config of a stage that trains by this method.

    Args:
      config: of the run; call it on the row that `given` returned.
      lr: the rate.
      updates: how many to make where `epochs` is 0.
    """
    return dataclasses.replace(
      config,
      train=dataclasses.replace(
        config.train,
        objective=self.objective,
        granularity=self.granularity,
        beta=self.beta,
        alpha=self.alpha,
        lr=lr,
        epochs=self.epochs or config.train.epochs,
        updates=0 if self.epochs else updates,
      ),
    )


def batch_of_step(loader: Loader, step: int) -> Batch:
  """Returns the batch as the loader packs it."""
  return loader.batch(step)


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss, the roles it trains and reads, and how its data is made.

  Attributes:
    name: what `config.train.objective` says to get it.
    label: its name in tables and plots.
    trains: roles of `roles.ROLES` whose weights the loss moves.
    loss: (params, outputs, batch, totals, setup) -> (loss, metrics) of a
      micro-batch; those of all micro-batches add up to the whole batch's.
    prepare: (params, reference, batch, setup) -> `Rows`; sees the whole batch.
    sequences: (trajectories, tokenize, config) -> what the loader packs.
    reads: further roles whose outputs the loss reads.
    batch: (loader, step) -> what a step gets; its leaves are split by rows.
    extra_forwards: forward passes over such a batch that `prepare` makes.
    group_size: answers that must share a row, side by side.
    section: of the config, where its batches and its optimiser are set.
    methods: its rows in the table of `oreo compare`.
  """

  name: str
  label: str
  trains: tuple[str, ...]
  loss: Callable[..., tuple[jax.Array, Metrics]]
  prepare: Callable[..., Rows]
  sequences: Callable[..., Sequence[Any]]
  reads: tuple[str, ...] = ()
  batch: Callable[[Loader, int], Any] = batch_of_step
  extra_forwards: int = 0
  group_size: int = 1
  section: str = "train"
  methods: tuple[Method, ...] = ()

  @property
  def colour(self) -> str:
    """Its colour in plots: that of its first method, grey without one."""
    return self.methods[0].colour if self.methods else "grey"

  @property
  def trains_policy(self) -> bool:
    """Whether the policy is trained; if not, it is the base itself."""
    return "policy" in self.trains

  @property
  def needs_critic(self) -> bool:
    """Whether there is a value network."""
    return "critic" in self.trains

  @property
  def needs_reference(self) -> bool:
    """Whether the frozen reference is run."""
    return "reference" in self.reads

  @property
  def trains_on_data(self) -> bool:
    """Whether all that it reads is what the loader packs, as it is packed."""
    return self.batch is batch_of_step

  def stage(self, config: Config) -> StageConfig:
    """Returns the section with its batches and its optimiser."""
    return getattr(config, self.section)

  def fit_rows(self, config: Config) -> Config:
    """Makes room for a group of answers in every row.

    Rows become `group_size` times as long and as many times fewer, so that a
    batch holds as many tokens as before. A single answer may be as long as it
    could be, and no longer.

    Args:
      config: with rows sized for one answer each; apply this once.

    Returns:
      The config for a stage with this objective; the same if answers stand
      alone.
    """
    size = self.group_size
    if size == 1:
      return config
    data, stage = config.data, self.stage(config)
    batch_size = max(stage.batch_size // size, 1)
    fitted = dataclasses.replace(
      config,
      data=dataclasses.replace(
        data,
        row_length=size * data.row_length,
        max_length=data.max_length or data.row_length + 1,
      ),
    )
    stage = dataclasses.replace(
      stage,
      batch_size=batch_size,
      grad_accum=math.gcd(batch_size, stage.grad_accum),
    )
    setattr(fitted, self.section, stage)
    return fitted
