"""`oreo aot`: compiles the real step for a machine that is not there."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from oreo_jax import files
from oreo_jax.aot import jobs, search, topology
from oreo_jax.aot.compilation import short_message
from oreo_jax.config import Config, ConfigError, ModelConfig, computed_like
from oreo_jax.models.presets import PRESETS
from oreo_jax.progress import Progress
from oreo_jax.stages.stage import Say, Stage
from oreo_jax.stages.workspace import Workspace, with_architecture

_FOLDER = "aot"


def run(workspace: Workspace, say: Say) -> None:
  """Compiles, says what the program takes, and writes it as JSON.

  Raises:
    ConfigError: if the program does not fit, or no layout of a search does;
      what came out is written all the same.
  """
  config = resolve(workspace)
  folder = workspace.path(_FOLDER)
  machine = topology.parse(config.aot.topology, config.aot.num_slices)
  topology.check_compiler(machine)
  if config.aot.search:
    return _search(config, folder, say)
  with Progress(1, f"aot {machine.name}", unit="program") as progress:
    (answer,) = jobs.compile_all([config], folder / "cache", progress=progress)
  jobs.check_answer(answer)
  path = folder / f"{config.aot.what}.json"
  files.write_json(path, answer)
  for line in describe(answer):
    say(line)
  say(f"written: {path}")
  if not answer["fits"]:
    raise ConfigError(
      f"the program does not fit {machine.name}: "
      f"{short_message(answer['message'])}; more of the compiler's words are "
      f"in {path}. More chips, --config.mesh.fsdp, a larger "
      "--config.train.grad_accum or --config.model.remat=full take less; "
      "--search tries them"
    )
  return None


def resolve(workspace: Workspace) -> Config:
  """Returns the config with architecture and vocabulary, without weights.

  Where `init` names a folder, its config.json is read and nothing else. Where
  there is no such folder yet, a preset of that name will do.
  """
  given = workspace.given_config
  if not given.aot.topology:
    raise ConfigError(
      "oreo aot needs a machine to compile for: set --topology=v5e:4x4, or "
      "--topology=cpu:8 for simulated devices"
    )
  mesh = given.mesh
  if given.aot.num_slices > 1 and mesh.dcn_data == 1:
    mesh = dataclasses.replace(mesh, dcn_data=given.aot.num_slices)
  given = dataclasses.replace(given, mesh=mesh)
  if not given.init:
    model = workspace.config.model
  elif pathlib.Path(given.init).exists():
    model = with_architecture(given.model, given.init)
  else:
    model = _preset(given.init, given.model)
  return dataclasses.replace(given, model=model)


def _preset(name: str, how: ModelConfig) -> ModelConfig:
  """Returns a published architecture, computed as `how` says."""
  for known, model in PRESETS.items():
    if name.rstrip("/").split("/")[-1].lower() == known.split("/")[-1].lower():
      return computed_like(how, model)
  raise ConfigError(
    f"config.init={name!r} is neither a folder nor a known architecture: set "
    f"--config.init to a checkpoint, or to one of {', '.join(PRESETS)}"
  )


def _search(config: Config, folder: pathlib.Path, say: Say) -> None:
  layouts = search.candidates(config)
  with Progress(len(layouts), "aot search", unit="program") as progress:
    answers = jobs.compile_all(
      layouts, folder / "cache", jobs=config.aot.jobs, progress=progress
    )
  ranked = search.rank(answers)
  path = folder / "layouts.json"
  files.write_json(path, {"ranked": ranked, "all": answers})
  say(f"{len(ranked)} of {len(layouts)} layouts fit {config.aot.topology}")
  for line in search.table(ranked):
    say(line)
  if not ranked:
    raise ConfigError(
      f"none of {len(layouts)} layouts fits {config.aot.topology} (all are in "
      f"{path}): take more chips, or larger --config.aot.grad_accum"
    )
  flags = folder / "best.flags"
  files.write_text(flags, "\n".join(ranked[0]["flags"]) + "\n")
  say("best: " + " ".join(ranked[0]["flags"]))
  say(f"written: {path}, and the flags of the best as {flags}")


def describe(answer: dict[str, Any]) -> list[str]:
  """Returns what an answer says, for people."""
  memory = answer["memory"]
  mesh = ", ".join(f"{k} {v}" for k, v in answer["mesh"].items() if v > 1)
  lines = [
    f"{answer['what']} on {answer['topology']}"
    + (f" x {answer['num_slices']}" if answer["num_slices"] > 1 else "")
    + f": {answer['devices']} devices, mesh {mesh or 'of one'}",
    f"compiler: {answer['compiler']}"
    + (" (cached)" if answer.get("cached") else ""),
    "bytes a device:",
  ]
  for name, size in memory["arguments"].items():
    lines.append(f"  {name:24} {gib(size):>10}")
  for name in ("temporaries", "peak", "limit", "on_host"):
    if memory.get(name):
      label = name.replace("_", " ")
      lines.append(f"  {label:24} {gib(memory[name]):>10}")
  if "flops" not in answer:
    return [*lines, answer["message"]] if answer["fits"] else lines
  lines += [
    f"compiled in {answer['compile_s']:.0f} s, lowered in "
    f"{answer['lower_s']:.1f} s",
    f"a device and call: {answer['flops']:.3g} flops, "
    f"{answer['hbm_bytes']:.3g} bytes of memory traffic",
  ]
  for name, item in answer["collectives"].items():
    largest = item["largest"]
    lines.append(
      f"  {name}: {gib(item['sent'])} sent in {item['runs']:.0f} runs; the "
      f"largest {gib(largest['sent'])}, {largest['times']:.0f} x "
      f"{largest['shape']}, {largest['line'] or 'of no known line'}"
    )
  if answer["unknown_loops"]:
    lines.append(
      "loops of unknown length: " + ", ".join(answer["unknown_loops"])
    )
  if answer["uncounted_kernels"]:
    lines.append(
      f"{answer['uncounted_kernels']} kernels do not say what they cost"
    )
  roofline = answer.get("roofline")
  if roofline:
    lines += [
      f"least time: compute {ms(roofline['compute_s'])}, HBM "
      f"{ms(roofline['hbm_s'])}, interconnect {ms(roofline['ici_s'])}, "
      f"between slices {ms(roofline['network_s'])}",
      f"bound by {roofline['bound']}: MFU at most {roofline['mfu']:.1%}, "
      f"{roofline['tokens_per_second']:.4g} tokens/s",
    ]
  return lines


def gib(size: float) -> str:
  """Returns bytes as text."""
  if size < 2**20:
    return f"{size / 2**10:.1f} KiB"
  if size < 2**30:
    return f"{size / 2**20:.1f} MiB"
  return f"{size / 2**30:.2f} GiB"


def ms(seconds: float) -> str:
  """Returns seconds as text."""
  return f"{1e3 * seconds:.3g} ms"


AOT = Stage(
  name="aot",
  summary="compiles for a machine that is not there (--topology=v5e:4x4)",
  run=run,
  leaves=lambda config: (_FOLDER,),
  needs_devices=False,
)
