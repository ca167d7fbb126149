"""`oreo export`: what training made, as Hugging Face directories."""

from __future__ import annotations

import pathlib
import shutil

from oreo_jax import files, models
from oreo_jax.config import ConfigError
from oreo_jax.stages.records import describe
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace
from oreo_jax.train.roles import ROLES


def run(workspace: Workspace, say: Say) -> None:
  """Exports the objective's models."""
  export(workspace)
  say(describe("export", workspace.record("export")))


def export(workspace: Workspace) -> None:
  """Writes `export/policy` and `export/value`.

  They open as a causal language model and as a classifier with one label, both
  with tokenizer and chat template, and with adapters merged. The adapters
  alone, where there are any, are PEFT directories: `export/policy_adapter`,
  `export/value_adapter`.
  """
  objective = workspace.config.train.objective
  roles = workspace.roles(objective)
  folder = workspace.path("export")
  places = {role: folder / ROLES[role].export for role in roles}
  for place in places.values():
    if place.exists():
      raise ConfigError(
        f"{place} is there already: remove it, or write it again with "
        "--overwrite"
      )
  stage_run = workspace.begin(EXPORT)
  for role, place in places.items():
    params, config = workspace.load_model(objective, role)
    models.save_hf(
      place,
      params,
      config,
      tokenizer=workspace.tokenizer,
      eos_ids=workspace.codec.end_ids,
    )
    adapter = workspace.path(objective) / "adapters" / place.name
    if adapter.exists() and workspace.is_chief:
      with files.whole_folder(folder / f"{place.name}_adapter") as partial:
        shutil.copytree(adapter, partial, dirs_exist_ok=True)
  stage_run.done(**{place.name: str(place) for place in places.values()})


def _reads(workspace: Workspace) -> dict[str, pathlib.Path]:
  objective = workspace.given_config.train.objective
  return {objective: workspace.record_path(objective)}


EXPORT = Stage(
  name="export",
  summary="writes Hugging Face directories",
  run=run,
  reads=_reads,
  leaves=lambda config: ("export",),
)
