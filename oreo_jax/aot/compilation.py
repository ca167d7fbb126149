"""One program compiled for one machine, and all there is to say about it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from oreo_jax import chips
from oreo_jax.aot import costs as counting
from oreo_jax.aot import groups, hlo, roofline, topology
from oreo_jax.aot.program import PROGRAMS, Program
from oreo_jax.config import Config
from oreo_jax.memory import bytes_on_device
from oreo_jax.sharding import make_mesh

# Lines of the compiler's message that are kept.
_MESSAGE_LINES = 60


def compile_program(config: Config) -> dict[str, Any]:
  """Compiles what `config.aot` asks for, in this process.

  Args:
    config: with its architecture and vocabulary; `config.aot` names machine
      and program.

  Returns:
    Plain values for JSON: whether it fits, bytes a device by kind, what it
    does, its roofline, collectives, times, and the compiler's words if it
    refused.

  Raises:
    ConfigError: where the settings cannot work on this machine, whatever its
      memory.
  """
  settings = config.aot
  machine = topology.parse(settings.topology, settings.num_slices)
  chip = topology.chip_of(config, machine)
  devices = topology.find_devices(machine)
  mesh = make_mesh(config.mesh, devices)
  program = PROGRAMS[settings.what](config, mesh)
  per_chip = max(len(devices) // machine.num_chips, 1)
  limit = topology.memory_of(config, len(devices))
  arguments = {
    name: bytes_on_device(tree) for name, tree in program.arguments.items()
  }
  answer: dict[str, Any] = {
    "topology": machine.name,
    "num_slices": machine.num_slices,
    "chips": machine.num_chips,
    "devices": len(devices),
    "chip": chip.name if chip else "",
    "what": settings.what,
    "flags": flags_of(config),
    "mesh": {axis: int(size) for axis, size in program.mesh.shape.items()},
    "tokens": program.tokens,
    "model_flops": program.model_flops,
    "compiler": _compiler(machine),
    "fits": True,
    "message": "",
    "memory": {
      "arguments": arguments,
      "arguments_total": sum(arguments.values()),
      "on_host": bytes_on_device(program.arguments, waiting=True),
      "limit": limit,
    },
  }
  if limit and sum(arguments.values()) > limit:
    return answer | {
      "fits": False,
      "message": "the arguments alone are more than the chip's memory",
    }
  with tempfile.TemporaryDirectory() as folder:
    options = {}
    if machine.kind != topology.CPU:
      # See `_text`.
      options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    return _compiled(
      answer, program, chip, per_chip, options, pathlib.Path(folder)
    )


def _compiled(
  answer: dict[str, Any],
  program: Program,
  chip: chips.Chip | None,
  per_chip: int,
  options: dict[str, Any],
  dump: pathlib.Path,
) -> dict[str, Any]:
  """Compiles and counts, with options for the compiler, which writes `dump`."""
  start = time.perf_counter()
  lowered = program.lower()
  lower_s = time.perf_counter() - start
  try:
    executable = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    lines = str(error).strip().splitlines()[:_MESSAGE_LINES]
    return answer | {"fits": False, "message": "\n".join(lines)}
  compile_s = time.perf_counter() - start - lower_s
  memory = answer["memory"] | _memory(executable)
  limit = memory["limit"]
  over = limit and memory["peak"] > limit
  answer = answer | {
    "fits": not over,
    "message": "the peak is more than the chip's memory" if over else "",
    "memory": memory,
    "lower_s": lower_s,
    "compile_s": compile_s,
  }
  text = _text(executable, dump)
  if not text:
    return answer | {
      "message": answer["message"]
      or "the compiler gives no text of this program, so nothing is counted"
    }
  costs = counting.count(
    hlo.parse(text),
    groups.Slices([_slice_of(device) for device in program.mesh.devices.flat]),
    loop_lengths=program.loop_lengths,
  )
  answer = answer | {
    "flops": costs.flops,
    "hbm_bytes": costs.hbm_bytes,
    "collectives": summary(costs.collectives),
    "unknown_loops": list(costs.unknown_loops),
    "uncounted_kernels": costs.uncounted_kernels,
  }
  if chip:
    line = roofline.make_roofline(
      costs,
      chip,
      model_flops=program.model_flops,
      devices=answer["devices"],
      devices_per_chip=per_chip,
    )
    answer["roofline"] = line._asdict() | {
      "step_s": line.step_s,
      "bound": line.bound,
      "tokens_per_second": program.tokens / line.step_s,
    }
  return answer


def summary(
  collectives: tuple[counting.Collective, ...],
) -> dict[str, dict[str, Any]]:
  """Adds up collectives by kind; those between slices are kinds of their own.

  Returns:
    By kind: bytes that a device sends, runs, and the one that sends most.
  """
  totals: dict[str, dict[str, Any]] = {}
  for item in sorted(collectives, key=lambda c: -c.sent):
    name = item.kind + (" between slices" if item.crosses_slices else "")
    total = totals.setdefault(
      name, {"sent": 0.0, "runs": 0.0, "largest": item._asdict()}
    )
    total["sent"] += item.sent
    total["runs"] += item.times
  return totals


def flags_of(config: Config) -> list[str]:
  """Returns the flags that give a run the layout that was compiled."""
  mesh = dataclasses.asdict(config.mesh)
  if config.aot.num_slices > 1 and mesh["dcn_data"] == 1:
    mesh["dcn_data"] = config.aot.num_slices
  return [
    *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
    f"--config.train.grad_accum={config.train.grad_accum}",
    f"--config.model.remat={config.model.remat}",
    f"--config.model.attention_block={config.model.attention_block}",
  ]


def _text(executable: Any, dump: pathlib.Path) -> str:
  """Returns the compiled program as text, "" where the compiler has none.

  Large programs for a v5p have collectives that jax cannot read back ("async-
  update instruction should have 1 operands"). What the compiler itself writes
  into its dump is the same text.

  Args:
    executable: the compiled program.
    dump: a folder that the compiler was asked to write to; it may be empty.
  """
  try:
    return executable.as_text() or ""
  except (RuntimeError, NotImplementedError):
    texts = [f.read_text() for f in dump.glob("*.after_codegen.txt")]
    return max(texts, key=len, default="")


def _memory(executable: Any) -> dict[str, float]:
  """Returns what the compiler says of memory, in bytes a device."""
  stats = executable.memory_analysis()
  if stats is None:
    return {"peak": 0.0}
  sizes = {
    "compiled_arguments": stats.argument_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "program": stats.generated_code_size_in_bytes,
  }
  together = (
    sizes["compiled_arguments"]
    + sizes["outputs"]
    - sizes["aliased"]
    + sizes["temporaries"]
  )
  # What is live at once may be less than the sum. The compiler for CPUs leaves
  # temporaries out of its peak, so that there the sum is the better figure.
  peak = getattr(stats, "peak_memory_in_bytes", 0)
  if peak <= sizes["temporaries"] or stats.host_argument_size_in_bytes:
    # The compiler for TPUs counts what is on the host among its peak.
    peak = together
  return sizes | {"peak": peak}


def _slice_of(device: Any) -> int:
  return getattr(device, "slice_index", None) or 0


def _compiler(machine: topology.Topology) -> str:
  """Names the compiler and its version."""
  from importlib import metadata

  if machine.kind == topology.CPU:
    return f"XLA for CPUs, jax {jax.__version__}"
  return f"libtpu {metadata.version('libtpu')}, jax {jax.__version__}"


def short_message(message: str) -> str:
  """Returns the line of the compiler's message that says how much is missing.

  Args:
    message: of an answer that does not fit.
  """
  match = re.search(r"Used [^.]*\.[^.]*\.[^.\n]*[^\n]*", message)
  return match[0] if match else (message.splitlines() or [""])[0]
