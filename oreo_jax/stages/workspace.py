"""A run's work directory: a folder, its config, and who made what from what.

config.py            the resolved configuration, good for --config again
tokenizer/           the tokenizer all stages share
<stage>/record.json  written last: the stage is done, from what, with which
                     settings and figures
<stage>/begun.json   the same of a stage under way
<stage>/model/<role> weights it made: Orbax, restorable onto any mesh
<stage>/metrics.jsonl, checkpoints/, ...

Opening a work directory writes nothing. A stage writes when it begins, after
everything that can be checked has been checked.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from jax.sharding import Mesh

from oreo_jax import data, files, hosts, models, tasks
from oreo_jax.config import (
  HOW_IT_RUNS,
  Config,
  ConfigError,
  ModelConfig,
  computed_like,
  save_config,
  to_dict,
)
from oreo_jax.decode.layout import Layout, make_layout
from oreo_jax.models import Params
from oreo_jax.models.hf.load import load_eos_ids, load_hf_config
from oreo_jax.rollout import Codec
from oreo_jax.sharding import make_mesh
from oreo_jax.stages.records import (
  BEGUN,
  RECORD,
  StageRun,
  check_identity,
  has_checkpoints,
  plain,
)
from oreo_jax.stages.tokenizer import open_tokenizer, save_tokenizer
from oreo_jax.stages.weights import (
  load_model,
  random_policy,
  save_models,
  saved_roles,
)
from oreo_jax.train import get_objective

# Settings that change how a stage is run and recorded, not what comes out. The
# trajectories of `path` are compared by content instead.
_NO_MATTER = (
  "log_every",
  "measure_every",
  "checkpoint_every",
  "keep_checkpoints",
  "loss_chunk",
  "loss_vocab_chunk",
  "offload",
  "loss_keep",
  "profile",
  "path",
  "tensor",
  "weights_share",
  *HOW_IT_RUNS,
)


@dataclasses.dataclass(frozen=True)
class Work:
  """Something that is done once in a work directory and leaves a record.

  Whether it is done follows from the settings and files its outcome depends on.

  Attributes:
    name: of the work, and of its folder unless it is given another.
    settings: sections and fields of the config that its outcome depends on.
      Settings of the stages before it are not among them: those are covered by
      the records it reads.
    reads: the files its outcome depends on, by name; they are compared by
      content.
  """

  name: str
  settings: tuple[str, ...] = ()
  reads: Callable[[Workspace], Mapping[str, pathlib.Path]] = lambda _: {}


class Workspace:
  """A config and the folder in which its stages find and leave things."""

  def __init__(self, config: Config, directory: str | pathlib.Path):
    """Checks the config; reads and writes nothing yet.

    Raises:
      ConfigError: if the config cannot work.
    """
    config.validate()
    get_objective(config.train.objective)
    for name in config.baselines:
      get_objective(name, "baselines")
    self.directory = pathlib.Path(directory)
    self.given_config = config
    # What config.py is to hold, where that is not `config`.
    self.kept_config: Config | None = None
    self.is_chief = hosts.is_chief()

  # --- What the config stands for, settled when first asked for.

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The mesh of this machine's devices that the config asks for."""
    return make_mesh(self.given_config.mesh)

  @functools.cached_property
  def task(self) -> tasks.Task | None:
    """The task, None for a run on a file of trajectories."""
    settings = self.given_config.task
    if not settings.name:
      return None
    return tasks.get_task(settings.name, **settings.options)

  def need_task(self, reason: str, instead: str = "") -> tasks.Task:
    """Returns the task.

    Args:
      reason: what it is needed for, said where there is none.
      instead: what can be done without it, said after that.

    Raises:
      ConfigError: without a task.
    """
    if self.task is None:
      raise ConfigError(f"{reason}: set --config.task.name{instead}")
    return self.task

  @functools.cached_property
  def config(self) -> Config:
    """The config with what it left open: architecture and vocabulary."""
    config = self.given_config
    model = with_architecture(config.model, config.init)
    size = len(self.tokenizer)
    if not model.vocab_size:
      model = dataclasses.replace(model, vocab_size=size)
    if model.vocab_size < size:
      raise ConfigError(
        f"config.model.vocab_size={model.vocab_size} is smaller than the "
        f"tokenizer's {size}: set --config.model.vocab_size=0 "
        "to take it from the tokenizer, and with --config.init use the "
        "tokenizer of that checkpoint"
      )
    return dataclasses.replace(config, model=model)

  @functools.cached_property
  def tokenizer(self) -> Any:
    """The tokenizer: the one in the folder, or the one the config names."""
    return open_tokenizer(
      self.path("tokenizer"), self.given_config, self.task, self.trajectories
    )

  @functools.cached_property
  def codec(self) -> Codec:
    """The door between text and tokens."""
    config = self.config
    ends = load_eos_ids(config.init) if config.init else ()
    return Codec.make(
      self.tokenizer, config.data, config.model.vocab_size, end_ids=ends
    )

  def with_config(self, config: Config) -> Workspace:
    """Returns the same folder, seen with other settings of its stages.

    What the folder keeps as its configuration stays this one's.
    """
    other = Workspace(config, self.directory)
    other.__dict__["task"] = self.task
    other.__dict__["tokenizer"] = self.tokenizer
    other.kept_config = self.config
    return other

  def trajectories(self) -> list[data.Trajectory]:
    """Reads the trajectories to train on: `data.path`, or those collected."""
    settings = self.given_config.data
    path = self.trajectories_path()
    if not path.exists():
      raise ConfigError(
        f"no trajectories at {path}: run `oreo collect` first, or name a file "
        "with --config.data.path=FILE"
      )
    trajectories = data.load_trajectories(path, on_error=settings.on_error)
    if settings.chat:
      trajectories = [
        dataclasses.replace(t, is_chat=True) for t in trajectories
      ]
    return trajectories

  def trajectories_path(self) -> pathlib.Path:
    """Returns where the trajectories to train on are."""
    own = self.path("collect") / "trajectories.jsonl"
    return pathlib.Path(self.given_config.data.path or own)

  # --- Stages: done or not, and from what.

  def path(self, folder: str) -> pathlib.Path:
    """Returns a stage's folder."""
    return self.directory / folder

  def settings_of(self, work: Work) -> dict[str, Any]:
    """Returns the settings that the outcome of some work depends on."""
    values = to_dict(self.config)
    return plain(
      {
        name: {k: v for k, v in values[name].items() if k not in _NO_MATTER}
        if isinstance(values[name], dict)
        else values[name]
        for name in work.settings
      }
    )

  def made_from(self, work: Work) -> dict[str, str]:
    """Returns a digest of every file the outcome of some work depends on."""
    return {
      name: files.digest(path)
      for name, path in sorted(work.reads(self).items())
      if path.exists()
    }

  def is_done(self, work: Work, folder: str = "") -> bool:
    """Returns whether the stage has ended, with what is here now.

    What binds is what was made: a record, or a checkpoint of a stage under
    way. A start that made nothing binds nobody.

    Args:
      work: a stage, or a part of one.
      folder: where it leaves its record; by default its name.

    Raises:
      ConfigError: if it was made, or partly made, with other settings or from
        other files.
    """
    folder = folder or work.name
    place = self.path(folder)
    record, begun = place / RECORD, place / BEGUN
    if record.exists():
      check_identity(files.read_json(record), self.identity(work), place)
      return True
    if begun.exists() and has_checkpoints(place):
      check_identity(files.read_json(begun), self.identity(work), place)
    return False

  def identity(self, work: Work) -> dict[str, Any]:
    """Returns what tells the outcome of some work from any other."""
    return {
      "settings": self.settings_of(work),
      "made_from": self.made_from(work),
    }

  def begin(self, work: Work, folder: str = "") -> StageRun:
    """Starts a stage: settings are checked by now, and files may be written."""
    folder = folder or work.name
    identity = self.identity(work)
    if self.is_chief:
      files.write_json(self.path(folder) / BEGUN, identity)
      settled = self.kept_config or self.config
      save_config(settled, self.directory / "config.py")
      save_tokenizer(self.path("tokenizer"), self.tokenizer, self.given_config)
    hosts.wait_for_all(f"{folder} begins")
    return StageRun(self.path(folder), identity)

  def remove(self, names: Sequence[str]) -> None:
    """Removes what a stage left, so that it is done again.

    Everything is checked before anything is removed: each name must lie right
    inside the work directory, which `train.objective=..` would not.

    Args:
      names: folders and files of the work directory; absent ones are no error.

    Raises:
      ConfigError: if a name leads out of the work directory.
    """
    home = self.directory.resolve()
    for name in names:
      place = (home / name).resolve()
      if place.parent != home:
        raise ConfigError(
          f"--overwrite would remove {place}, which is not right inside the "
          f"work directory {home}: name a stage of it"
        )
    if self.is_chief:
      for name in names:
        files.remove(home / name)
    hosts.wait_for_all("what a stage left is removed")

  def record(self, folder: str) -> dict[str, Any]:
    """Returns what a finished stage wrote of itself."""
    path = self.path(folder) / RECORD
    if not path.exists():
      raise ConfigError(
        f"{path} is not there: run the stage `{folder}` in this --workdir first"
      )
    return files.read_json(path)

  def record_path(self, folder: str) -> pathlib.Path:
    """Returns where a finished stage has its record."""
    return self.path(folder) / RECORD

  # --- Models.

  def save_models(
    self,
    folder: str,
    step: int,
    models_by_role: Mapping[str, Params],
    config: ModelConfig,
  ) -> None:
    """Saves whole weights, a model a role, as the outcome of a stage."""
    save_models(self.path(folder), step, models_by_role, config)

  def roles(self, folder: str) -> list[str]:
    """Returns the roles whose models a finished stage left."""
    self.record(folder)
    return saved_roles(self.path(folder))

  def load_model(self, folder: str, role: str) -> tuple[Params, ModelConfig]:
    """Reads one model of a finished stage, straight into its shards."""
    return load_model(self.path(folder), role, self.config.model, self.mesh)

  def layout(self, *heads: str) -> Layout:
    """Returns how networks with these heads lie while they sample together.

    Args:
      *heads: "lm" for the policy, "value" for a value network.
    """
    config = self.config
    return make_layout(config.model, self.mesh, config.sampling, heads=heads)

  def start_record(self) -> pathlib.Path:
    """Returns the record of the policy training starts from.

    It is absent where that policy is a checkpoint or random.
    """
    return self.record_path("sft")

  def start_policy(self) -> Params:
    """Returns the policy training starts from: SFT's, `init`'s, or random."""
    if self.record_path("sft").exists():
      return self.load_model("sft", "policy")[0]
    return self.initial_policy()

  def base_name(self) -> str:
    """Returns the checkpoint that adapters trained here belong to.

    Empty when the starting policy is no checkpoint that has a name: after SFT,
    or in a later round, it exists in this run alone.
    """
    return "" if self.path("sft").exists() else self.config.init

  def initial_policy(self) -> Params:
    """Returns the weights before any training."""
    config = self.config.model
    if self.config.init:
      return models.load_hf(
        self.config.init,
        mesh=self.mesh,
        head="lm",
        dtype=config.dtype,
        param_dtype=config.param_dtype,
      )[0]
    logging.info("no SFT model and no --config.init: starting from random")
    return random_policy(config, self.config.seed, self.mesh)


def with_architecture(model: ModelConfig, init: str) -> ModelConfig:
  """Returns the checkpoint's architecture, computed as `model` says."""
  return computed_like(model, load_hf_config(init)) if init else model
