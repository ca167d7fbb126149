"""Typed configuration: one dataclass a section, checked before anything runs.

A file in `configs/` returns a `Config` from `get_config(variant)`; flags change
single fields (`--config.train.lr=1e-4`). What a setting may be stands beside
it: a number is not negative unless its limits say otherwise, and the first word
of a `choice` is the default. What one setting must be because of another is a
rule of its section.

The dataclasses are hashable, so that a section can be a static argument of
`jax.jit`, and not frozen, because the flags set attributes. Types are real
types, never strings: the flag parser reads them.
"""

import dataclasses
import pathlib
import pprint
from collections.abc import Iterator
from typing import Any

from oreo_jax import files
from oreo_jax.config.agents import AgentConfig
from oreo_jax.config.networks import (
  ATTENTIONS,
  DTYPES,
  HOW_IT_RUNS,
  INT8,
  PROJECTIONS,
  REMAT,
  CriticConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  SamplingConfig,
  computed_like,
)
from oreo_jax.config.stages import (
  GRANULARITIES,
  OFFLOAD,
  AotConfig,
  CollectConfig,
  CompareConfig,
  DataConfig,
  EvaluateConfig,
  GenerateConfig,
  MethodConfig,
  SftConfig,
  StageConfig,
  TaskConfig,
  TrainConfig,
)
from oreo_jax.settings import (
  ConfigError,
  Rule,
  Section,
  build,
  choice,
  field_paths,
  positive,
  section,
  setting,
  unknown_key,
)

__all__ = [
  "ATTENTIONS",
  "DTYPES",
  "GRANULARITIES",
  "HOW_IT_RUNS",
  "INT8",
  "OFFLOAD",
  "PROJECTIONS",
  "REMAT",
  "AgentConfig",
  "AotConfig",
  "CollectConfig",
  "CompareConfig",
  "Config",
  "ConfigError",
  "CriticConfig",
  "DataConfig",
  "EvaluateConfig",
  "GenerateConfig",
  "LoraConfig",
  "MeshConfig",
  "MethodConfig",
  "ModelConfig",
  "SamplingConfig",
  "SftConfig",
  "StageConfig",
  "TaskConfig",
  "TrainConfig",
  "computed_like",
  "field_paths",
  "from_dict",
  "save_config",
  "to_dict",
  "unknown_key",
]


@dataclasses.dataclass(unsafe_hash=True)
class Config(Section):
  """A run, whole: what `get_config(variant)` of a file in configs/ returns."""

  seed: int = 0  # of the initial weights; stages have seeds of their own
  init: str = ""  # a checkpoint directory to start from; empty: random weights
  # Objectives that `run` trains besides.
  baselines: tuple = setting(("rejection",), entry=str)
  rounds: int = positive(1)  # collect-and-train rounds of `iterate`
  # Where the critic of a round starts: the round's reference, or the last one.
  round_critic: str = choice("fresh", "continue")
  # Problems of a round: those of the first, or the next collect.problems ones.
  round_problems: str = choice("same", "fresh")
  model: ModelConfig = section(ModelConfig)
  critic: CriticConfig = section(CriticConfig)
  lora: LoraConfig = section(LoraConfig)
  mesh: MeshConfig = section(MeshConfig)
  sampling: SamplingConfig = section(SamplingConfig)
  task: TaskConfig = section(TaskConfig)
  agent: AgentConfig = section(AgentConfig)
  data: DataConfig = section(DataConfig)
  sft: SftConfig = section(SftConfig)
  collect: CollectConfig = section(CollectConfig)
  train: TrainConfig = section(TrainConfig)
  evaluate: EvaluateConfig = section(EvaluateConfig)
  generate: GenerateConfig = section(GenerateConfig)
  compare: CompareConfig = section(CompareConfig)
  aot: AotConfig = section(AotConfig)

  def rules(self) -> Iterator[Rule]:
    """Yields what sections must be because of each other."""
    data = self.data
    adapted = self.lora.policy or self.critic.kind == "lora"
    yield Rule(
      not self.train.keep_trunk or (adapted and self.lora.last_layers > 0),
      "train.keep_trunk",
      "False, unless there are frozen layers below adapters: set "
      "lora.last_layers, with lora.policy=True or critic.kind=lora",
    )
    yield Rule(
      data.tokenizer != "hf" or bool(data.tokenizer_path or self.init),
      "data.tokenizer_path",
      "a directory, since data.tokenizer=hf and init is empty",
    )
    # Fresh token ids would be read off rows of the embedding that mean others.
    yield Rule(
      not self.init or data.tokenizer in ("task", "hf"),
      "data.tokenizer",
      f"hf, since the checkpoint init={self.init!r} brings its own tokenizer "
      "(--config.data.tokenizer=hf)",
    )


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the nested dict of plain values that `from_dict` reads back."""
  return dataclasses.asdict(config)


def from_dict(
  values: dict[str, Any], kind: type = Config, path: str = ""
) -> Any:
  """Builds a config, or one section of it; see `settings.build`."""
  return build(kind, values, path)


def save_config(config: Config, path: str | pathlib.Path) -> None:
  """Writes the resolved config as a file that `--config` accepts again."""
  values = pprint.pformat(to_dict(config), sort_dicts=False, width=76)
  text = (
    '"""The resolved configuration of this run; give it back as --config."""\n'
    "\nfrom oreo_jax.config import from_dict\n\n\n"
    f"def get_config():\n  return from_dict(VALUES)\n\n\nVALUES = {values}\n"
  )
  files.write_text(path, text)
