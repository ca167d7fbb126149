"""Which layouts of a step to try, and which of those that fit is best."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from oreo_jax.aot import topology
from oreo_jax.config import Config, ConfigError


def candidates(config: Config) -> list[Config]:
  """Returns the config in every layout that `config.aot` lists.

  Sizes that do not divide what they split are left out: heads by `tensor`, the
  chips of a slice by the mesh, rows of a micro-batch by the shards.

  Raises:
    ConfigError: if none is left.
  """
  settings, model = config.aot, config.model
  machine = topology.parse(settings.topology, settings.num_slices)
  stage = config.train
  # The compiler sees both cores of a v4 as devices.
  per_slice = machine.num_chips // machine.num_slices
  per_slice *= 2 if machine.kind == "v4" else 1
  layouts = []
  for tensor, data, accum, remat, block in itertools.product(
    settings.tensor,
    settings.data,
    settings.grad_accum,
    settings.remat,
    settings.attention_block,
  ):
    fsdp, rest = divmod(per_slice, tensor * data)
    shards = machine.num_slices * data * fsdp
    if (
      rest
      or model.num_heads % tensor
      or model.num_kv_heads % tensor
      or stage.batch_size % accum
      or (stage.batch_size // accum) % max(shards, 1)
    ):
      continue
    mesh = dataclasses.replace(
      config.mesh,
      dcn_data=machine.num_slices,
      data=data,
      fsdp=fsdp,
      tensor=tensor,
    )
    layouts.append(
      dataclasses.replace(
        config,
        mesh=mesh,
        model=dataclasses.replace(model, remat=remat, attention_block=block),
        train=dataclasses.replace(stage, grad_accum=accum),
      )
    )
  if not layouts:
    raise ConfigError(
      f"no layout of config.aot.tensor={settings.tensor}, "
      f"data={settings.data}, grad_accum={settings.grad_accum} divides "
      f"{machine.num_chips} chips, {model.num_kv_heads} key/value heads and "
      f"{stage.batch_size} rows: set --config.aot.tensor, --config.aot.data or "
      "--config.aot.grad_accum"
    )
  return layouts


def rank(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the answers that fit, the best first.

  That is the least time by the roofline, and of equals the least memory; where
  the machine has no peaks, the least memory.
  """

  def order(answer: dict[str, Any]) -> tuple[float, float]:
    time_s = answer.get("roofline", {}).get("step_s", 0.0)
    return time_s, answer["memory"]["peak"]

  return sorted((a for a in answers if a["fits"]), key=order)


def table(ranked: list[dict[str, Any]]) -> list[str]:
  """Returns a line an answer that fits, the best first."""
  lines = []
  for place, answer in enumerate(ranked, start=1):
    mesh = " ".join(
      f"{axis}={n}" for axis, n in answer["mesh"].items() if n > 1
    )
    rest = " ".join(
      flag.removeprefix("--config.")
      for flag in answer["flags"]
      if not flag.startswith("--config.mesh.")
    )
    line = f"{place:3}. {mesh or 'one device'} {rest}: "
    line += f"peak {answer['memory']['peak'] / 2**30:.2f} GiB"
    if "roofline" in answer:
      roofline = answer["roofline"]
      line += (
        f", at least {1e3 * roofline['step_s']:.3g} ms "
        f"({roofline['bound']}), MFU {roofline['mfu']:.1%}"
      )
    lines.append(line)
  return lines
