"""Machines that are not there: their names, devices and compilers.

A topology is named "KIND:SHAPE": "v5e:4x4" is sixteen TPU v5e chips in a
square, compiled for by libtpu, which needs no TPU. "cpu:8" is eight simulated
devices of this machine, good for tests and for a first look at a mesh.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from oreo_jax import chips
from oreo_jax.config import Config, ConfigError

CPU = "cpu"
TPUS = ("v4", "v5e", "v5p", "v6e")

# A process that only compiles must not look for a TPU, nor lock one.
_COMPILER_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Topology(NamedTuple):
  """A kind of chip, how many stand along each axis, and how many slices."""

  kind: str  # of `TPUS`, or `CPU`
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def name(self) -> str:
    """The name as it was given, without the number of slices."""
    return f"{self.kind}:{'x'.join(map(str, self.shape))}"

  @property
  def num_chips(self) -> int:
    """Chips of all slices."""
    return math.prod(self.shape) * self.num_slices

  @property
  def chip(self) -> chips.Chip | None:
    """The peaks of a chip; None for a CPU, which has no row in the table."""
    return chips.CHIPS.get(self.kind)


def parse(name: str, num_slices: int = 1) -> Topology:
  """Reads the name of a topology.

  Args:
    name: such as "v5e:4x4" or "cpu:8".
    num_slices: slices of this shape, joined by the data-centre network.

  Raises:
    ConfigError: if there is no such kind, or the shape does not suit it.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
  shape = tuple(map(int, match[2].split("x"))) if match else ()
  kind = match[1] if match else ""
  dimensions = {CPU: 1, "v5e": 2, "v6e": 2, "v4": 3, "v5p": 3}
  if dimensions.get(kind) != len(shape) or 0 in shape:
    raise ConfigError(
      f"aot.topology={name!r}: expected a kind and a shape, as in v5e:4x4, "
      "v6e:8x8, v5p:2x2x4, v4:2x2x2 or cpu:8; set --topology=KIND:SHAPE"
    )
  if kind == CPU and num_slices > 1:
    raise ConfigError(
      f"aot.num_slices={num_slices}: simulated devices have no slices; set "
      "--num_slices=1, or name a TPU with --topology=v5e:4x4"
    )
  return Topology(kind, shape, num_slices)


def chip_of(config: Config, topology: Topology) -> chips.Chip | None:
  """Returns whose peaks `config.aot` measures by; None: there are none.

  Raises:
    ConfigError: if `config.aot.chip` names no chip.
  """
  name = config.aot.chip
  if not name:
    return topology.chip
  if name not in chips.CHIPS:
    raise ConfigError(
      f"config.aot.chip: expected one of {', '.join(chips.CHIPS)}, got "
      f"{name!r}: set --config.aot.chip=..."
    )
  return chips.CHIPS[name]


def memory_of(config: Config, devices: int) -> float:
  """Returns the bytes that a program may take on a device; 0: any.

  Args:
    config: its section `aot` names the machine.
    devices: of the machine; a chip may be several.
  """
  machine = parse(config.aot.topology, config.aot.num_slices)
  chip = chip_of(config, machine)
  limit = config.aot.hbm_gib * chips.GIB or (chip.hbm_bytes if chip else 0.0)
  return limit / max(devices // machine.num_chips, 1)


def environment(topology: Topology) -> dict[str, str]:
  """Returns the variables that a process which compiles has to start with."""
  variables = dict(_COMPILER_ENVIRONMENT)
  if topology.kind == CPU:
    variables["XLA_FLAGS"] = (
      f"--xla_force_host_platform_device_count={topology.num_chips}"
    )
  return variables


def check_compiler(topology: Topology) -> None:
  """Raises a ConfigError where the compiler of a topology is not installed."""
  if topology.kind != CPU and importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"aot.topology={topology.name!r} needs the TPU compiler: "
      "pip install libtpu (it needs no TPU)"
    )


def find_devices(topology: Topology) -> Sequence[Any]:
  """Returns the devices to build a mesh of.

  A chip may be two devices: of a v4 the compiler sees both cores.

  Raises:
    ConfigError: if the compiler knows no such topology, or this process was
      not started with the variables of `environment`.
  """
  if topology.kind == CPU:
    devices = jax.devices("cpu")
    if len(devices) < topology.num_chips:
      raise ConfigError(
        f"aot.topology={topology.name!r}: this process has {len(devices)} CPU "
        f"devices; start it with XLA_FLAGS="
        f"{environment(topology)['XLA_FLAGS']}"
      )
    return devices[: topology.num_chips]
  check_compiler(topology)
  from jax.experimental import topologies

  options = {"num_slices": topology.num_slices}
  try:
    described = topologies.get_topology_desc(
      platform="tpu",
      topology_name=topology.name,
      **(options if topology.num_slices > 1 else {}),
    )
  except (ValueError, RuntimeError, NotImplementedError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ConfigError(
      f"aot.topology={topology.name!r} with {topology.num_slices} slices: the "
      f"compiler knows no such machine ({reason}); set --topology to a shape "
      "that is sold, such as v5e:4x4, v5e:8x8 or v5p:2x2x4"
    ) from error
  return described.devices
