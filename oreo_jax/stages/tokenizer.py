"""The tokenizer of a work directory: made once, kept beside the models.

A model is trained on the tokens of one tokenizer, so the folder remembers the
settings that chose it, and other settings are refused.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from oreo_jax import data, files
from oreo_jax.config import Config, ConfigError
from oreo_jax.stages.records import difference, plain
from oreo_jax.tasks import Task

# In the tokenizer's folder: the settings that chose it.
_SOURCE = "source.json"


def open_tokenizer(
  folder: pathlib.Path,
  config: Config,
  task: Task | None,
  trajectories: Callable[[], Sequence[data.Trajectory]],
) -> Any:
  """Returns the tokenizer in the folder, or makes the one the config names.

  Args:
    folder: where a stage that has begun keeps it.
    config: of the run.
    task: brings its own where `data.tokenizer` is "task".
    trajectories: reads the texts that a new "bpe" is trained on.

  Raises:
    ConfigError: if other settings chose the one in the folder, or if the
      config names none that can be.
  """
  if folder.is_dir():
    _check_source(folder, config)
    return data.load_tokenizer(folder)
  settings = config.data
  if config.init:
    if settings.tokenizer in ("byte", "bpe"):
      raise ConfigError(
        f"config.data.tokenizer={settings.tokenizer!r} would put new tokens "
        f"over the weights of {config.init}: a checkpoint brings its own "
        "tokenizer, set --config.data.tokenizer=hf"
      )
    return data.load_tokenizer(settings.tokenizer_path or config.init)
  if settings.tokenizer == "task":
    made = task.make_tokenizer() if task else None
    if made is None:
      raise ConfigError(
        f"task {config.task.name!r} brings no tokenizer: set "
        "--config.init=DIR of a checkpoint that has one, or "
        "--config.data.tokenizer=byte, bpe or hf"
      )
    return made
  texts: list[str] = []
  if settings.tokenizer == "bpe":
    texts = [turn.content for t in trajectories() for turn in t.turns]
  return data.make_tokenizer(
    settings.tokenizer,
    texts=texts,
    vocab_size=settings.tokenizer_vocab,
    path=settings.tokenizer_path,
  )


def save_tokenizer(
  folder: pathlib.Path, tokenizer: Any, config: Config
) -> None:
  """Keeps the tokenizer, and what chose it, unless it is there already."""
  if not folder.is_dir():
    data.save_tokenizer(tokenizer, folder)
    files.write_json(folder / _SOURCE, _source(config))


def _source(config: Config) -> dict[str, Any]:
  """Returns the settings that choose the tokenizer."""
  names = ("tokenizer", "tokenizer_path", "tokenizer_vocab")
  return plain(
    {name: getattr(config.data, name) for name in names}
    | {"init": config.init, "task": config.task.name}
  )


def _check_source(folder: pathlib.Path, config: Config) -> None:
  """Refuses a saved tokenizer that other settings chose."""
  source = folder / _SOURCE
  if not source.exists():
    return
  changed = difference(files.read_json(source), _source(config), "")
  if changed:
    names = ", ".join(name.lstrip(".") for name in changed)
    raise ConfigError(
      f"{folder} was made with other settings ({names}), and a model is "
      "trained on its tokens: use another --workdir, or remove the folder if "
      "nothing was trained yet"
    )
