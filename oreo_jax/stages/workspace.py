"""A run's work directory: what every stage finds and leaves there.

config.py            the resolved configuration, good for --config again
tokenizer/           the tokenizer all stages share
<stage>/record.json  written last: the stage is done, with its settings
<stage>/model/       weights it made: Orbax, restorable onto any mesh
<stage>/metrics.jsonl, checkpoints/, ...
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from oreo_jax import data, files, hosts, models, tasks
from oreo_jax.config import (
  Config,
  ConfigError,
  ModelConfig,
  from_dict,
  save_config,
  to_dict,
)
from oreo_jax.models import Params
from oreo_jax.models.hf.load import load_eos_ids, load_hf_config
from oreo_jax.sharding import make_mesh, shardings_of
from oreo_jax.train.checkpoint import Checkpoints, abstract_like

# Settings that a stage's outcome depends on, its own and those before it.
_BEFORE = ("seed", "init", "model", "task", "data")
_SECTIONS = {
  "sft": (*_BEFORE, "sft"),
  "collect": (*_BEFORE, "sft", "collect"),
  "train": (*_BEFORE, "sft", "collect", "critic", "lora", "train"),
  "evaluate": (
    *_BEFORE,
    "sft",
    "collect",
    "critic",
    "lora",
    "train",
    "evaluate",
  ),
}

# Settings that change how a stage is run and recorded, not what comes out.
_NO_MATTER = (
  "log_every",
  "measure_every",
  "checkpoint_every",
  "keep_checkpoints",
  "loss_chunk",
  "remat",
  "unroll",
)


class Workspace:
  """A config, its work directory, mesh, task and tokenizer."""

  def __init__(self, config: Config, directory: str | pathlib.Path):
    """Opens the directory and settles what the config left open.

    Raises:
      ConfigError: if the config cannot work.
    """
    config.validate()
    self.directory = pathlib.Path(directory)
    self.mesh: Mesh = make_mesh(config.mesh)
    self.task = (
      tasks.get_task(config.task.name, **config.task.options)
      if config.task.name
      else None
    )
    self.is_chief = hosts.is_chief()
    self.tokenizer = self._open_tokenizer(config)
    model = _with_architecture(config.model, config.init)
    if not model.vocab_size:
      model = dataclasses.replace(model, vocab_size=len(self.tokenizer))
    if model.vocab_size < len(self.tokenizer):
      raise ConfigError(
        f"config.model.vocab_size={model.vocab_size} is smaller than the "
        f"tokenizer's {len(self.tokenizer)}: set --config.model.vocab_size=0 "
        "to take it from the tokenizer, and with --config.init use the "
        "tokenizer of that checkpoint"
      )
    self.config = dataclasses.replace(config, model=model)
    if self.is_chief:
      save_config(self.config, self.directory / "config.py")

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """Tokens that end an answer: a chat model has several."""
    found = [self.tokenizer.eos_token_id]
    if self.config.init:
      found += load_eos_ids(self.config.init)
    if self.config.data.chat:
      turns = (data.Turn("user", "a"), data.Turn("assistant", "b"))
      chat = data.Trajectory(turns, 0.0, is_chat=True)
      # An answer's last token is what the template ends a turn with.
      found.append(
        int(data.tokenize_trajectory(chat, self.tokenizer).tokens[-1])
      )
    return tuple(dict.fromkeys(token for token in found if token is not None))

  def _open_tokenizer(self, config: Config):
    saved = self.directory / "tokenizer"
    settings = config.data
    if saved.is_dir():
      return data.load_tokenizer(saved)
    own = settings.tokenizer in ("task", "hf") and not settings.tokenizer_path
    if config.init and own:
      found = data.load_tokenizer(config.init)
    elif settings.tokenizer == "task":
      found = self.task.make_tokenizer() if self.task else None
      if found is None:
        raise ConfigError(
          f"task {config.task.name!r} brings no tokenizer: set "
          "--config.init=DIR of a checkpoint that has one, or "
          "--config.data.tokenizer=byte, bpe or hf"
        )
    else:
      texts: list[str] = []
      if settings.tokenizer == "bpe":
        texts = [
          turn.content
          for trajectory in self._trajectories(config)
          for turn in trajectory.turns
        ]
      found = data.make_tokenizer(
        settings.tokenizer,
        texts=texts,
        vocab_size=settings.tokenizer_vocab,
        path=settings.tokenizer_path,
      )
    if self.is_chief:
      data.save_tokenizer(found, saved)
    return found

  def _trajectories(self, config: Config) -> list[data.Trajectory]:
    path = config.data.path or self.directory / "collect" / "trajectories.jsonl"
    if not pathlib.Path(path).exists():
      raise ConfigError(
        f"no trajectories at {path}: run `oreo collect` first, or name a file "
        "with --config.data.path=FILE"
      )
    found = data.load_trajectories(path, on_error=config.data.on_error)
    if config.data.chat:
      found = [dataclasses.replace(t, is_chat=True) for t in found]
    return found

  def trajectories(self) -> list[data.Trajectory]:
    """Reads the trajectories to train on: `data.path`, or those collected."""
    return self._trajectories(self.config)

  # --- Stages: done or not.

  def path(self, stage: str) -> pathlib.Path:
    """Returns the stage's folder."""
    return self.directory / stage

  def settings_of(self, stage: str) -> dict[str, Any]:
    """Returns the settings that the stage's outcome depends on."""
    values = to_dict(self.config)
    kind = stage if stage in _SECTIONS else "train"
    if kind == "train":
      # The stage's own name says what it was trained by.
      values["train"]["objective"] = stage
    found = {
      section: {k: v for k, v in values[section].items() if k not in _NO_MATTER}
      if isinstance(values[section], dict)
      else values[section]
      for section in _SECTIONS[kind]
    }
    return json.loads(json.dumps(found))

  def is_done(self, stage: str) -> bool:
    """Returns whether the stage has ended, with the settings of now.

    Raises:
      ConfigError: if it was run, or begun, with other settings.
    """
    for name in ("record.json", "begun.json"):
      path = self.path(stage) / name
      if not path.exists():
        continue
      before = json.loads(path.read_text())["settings"]
      changed = _difference(before, self.settings_of(stage))
      if changed:
        raise ConfigError(
          f"{path.parent} was made with other settings ({', '.join(changed)}):"
          " use another --workdir, or --overwrite to do the stage again"
        )
      if name == "record.json":
        return True
    return False

  def begin(self, stage: str) -> "StageRun":
    """Starts the clock of a stage; see `StageRun`."""
    folder = self.path(stage)
    if self.is_chief:
      folder.mkdir(parents=True, exist_ok=True)
      begun = {"settings": self.settings_of(stage)}
      files.write_json(folder / "begun.json", begun)
    return StageRun(self, stage)

  def record(self, stage: str) -> dict[str, Any]:
    """Returns what a finished stage wrote of itself."""
    path = self.path(stage) / "record.json"
    if not path.exists():
      raise ConfigError(
        f"{path} is not there: run the stage `{stage}` in this --workdir first"
      )
    return json.loads(path.read_text())

  # --- Models.

  def save_model(
    self, stage: str, step: int, params: Params, config: ModelConfig
  ) -> None:
    """Saves whole weights, a dict of models by role, as the stage's outcome."""
    record = {"model": dataclasses.asdict(config), "roles": sorted(params)}
    with Checkpoints(self.path(stage) / "model", keep=1) as checkpoints:
      checkpoints.save(step, params, record)

  def load_model(self, stage: str) -> tuple[dict[str, Params], ModelConfig]:
    """Reads the stage's models by role, straight into their shards."""
    with Checkpoints(self.path(stage) / "model", keep=1) as checkpoints:
      record = checkpoints.record()
      config = from_dict(record["model"], ModelConfig, "model")
      # How to compute is this run's business, what to compute the weights'.
      ours = self.config.model
      config = dataclasses.replace(
        config, dtype=ours.dtype, remat=ours.remat, unroll=ours.unroll
      )
      abstract = {}
      for role in record["roles"]:
        head = "value" if role == "critic" else "lm"
        shapes = models.abstract_params(config, head=head)
        axes = models.logical_axes(config, head=head)
        abstract[role] = abstract_like(
          shapes, shardings_of(axes, shapes, self.mesh)
        )
      return checkpoints.restore(abstract), config

  def start_policy(self) -> Params:
    """Returns the policy training starts from: SFT's, `init`'s, or random."""
    if (self.path("sft") / "record.json").exists():
      return self.load_model("sft")[0]["policy"]
    return self.initial_policy()

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
    axes = models.logical_axes(config)
    shardings = shardings_of(axes, models.abstract_params(config), self.mesh)
    draw = jax.jit(
      models.init, static_argnames="config", out_shardings=shardings
    )
    return draw(jax.random.key(self.config.seed), config=config)


def _with_architecture(model: ModelConfig, init: str) -> ModelConfig:
  """Returns the checkpoint's architecture, computed as `model` says."""
  if not init:
    return model
  how = ("dtype", "param_dtype", "remat", "unroll")
  settings = {name: getattr(model, name) for name in how}
  return dataclasses.replace(load_hf_config(init), **settings)


class StageRun:
  """A stage under way; `done` writes the record that ends it."""

  def __init__(self, workspace: Workspace, stage: str):
    """Starts the clock."""
    self._workspace = workspace
    self._stage = stage
    self._start = time.monotonic()

  def done(self, **figures: Any) -> None:
    """Marks the stage as finished, with figures worth keeping."""
    record = {
      "settings": self._workspace.settings_of(self._stage),
      "seconds": round(time.monotonic() - self._start, 2),
      **figures,
    }
    if self._workspace.is_chief:
      folder = self._workspace.path(self._stage)
      files.write_json(folder / "record.json", record)
    # Other processes look for it next.
    hosts.wait_for_all(f"{self._stage} is done")


def _difference(before: dict, now: dict, path: str = "config") -> list[str]:
  """Returns the dotted names of the settings that differ."""
  changed = []
  for key in sorted({*before, *now}):
    name = f"{path}.{key}"
    old, new = before.get(key), now.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
      changed += _difference(old, new, name)
    elif old != new:
      changed.append(name)
  return changed
