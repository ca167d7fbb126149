"""What training steps cost: time, tokens, FLOPs and memory.

The devices work behind the Python program's back: a step that was asked for is
not a step that is done. Times are therefore read only where the loop waits for
the devices anyway, and the tokens of the steps between are counted on the
devices and fetched with the rest.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from oreo_jax import chips
from oreo_jax.train.flops import step_flops
from oreo_jax.train.setup import Setup

_GIB = 2**30


class Meter:
  """Measures the steps between two rows of the records.

  A row has, as means over its steps where not said otherwise:

    time/step_s            seconds from step to step, without those below
                           that are marked with *
    time/data_s            of which the loop waited for its batch
    time/compile_s *       the first call: tracing, compilation
    time/measure_s *       measuring on held-out problems, in all
    time/checkpoint_s *    saving, as far as training waits for it, in all
    speed/tokens_per_s     all tokens that are read, prompts too, no padding
    speed/action_tokens_per_s  those of them that the losses are about
    speed/step_flops       model FLOPs of a step (`flops.step_flops`)
    speed/mfu              their share of what the chips can do in bfloat16;
                           only where `chips` knows the chip
    batch/fill             share of the slots that are no padding
    memory/device_peak_gib     most that a device of this process has held;
                           where it does not say, as on a CPU:
    memory/process_peak_gib    most that this process has held

  Rates are those of all processes together.
  """

  def __init__(
    self,
    setup: Setup,
    mesh: Mesh,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Starts the clock.

    Args:
      setup: what is fixed during the stage.
      mesh: the devices that share a step.
      clock: seconds that only rise.
    """
    self._setup = setup
    self._peak_flops = peak_flops(mesh)
    self._clock = clock
    self._step_flops = 0.0
    self._slots = 0  # of a batch, all processes together
    self._restart()

  @contextlib.contextmanager
  def span(self, name: str) -> Iterator[None]:
    """Counts what happens inside as "data", "compile", "measure" and so on.

    All but "data" is no part of a step: enter them when the devices have done
    what they were asked for.
    """
    start = self._clock()
    yield
    spent = self._clock() - start
    self._spent[name] = self._spent.get(name, 0.0) + spent

  def count(self, batch: Any, metrics: Mapping[str, jax.Array]) -> None:
    """Counts a step that was asked for, without waiting for it.

    Args:
      batch: the step's global arrays [B, T].
      metrics: what the step says of the batch.
    """
    if not self._slots:
      rows, length = jax.tree.leaves(batch)[0].shape
      self._slots = rows * length
      self._step_flops = sum(step_flops(self._setup, rows, length).values())
    self._steps.append(
      (metrics["batch/tokens"], metrics["batch/action_tokens"])
    )

  def read(self) -> dict[str, float]:
    """Returns the figures since the last call; the last step must be done."""
    counts = jax.device_get(self._steps)
    seconds = self._clock() - self._start
    # Whatever else the loop did meanwhile is not the steps' fault.
    seconds -= sum(s for name, s in self._spent.items() if name != "data")
    seconds = max(seconds, 1e-9)
    steps = len(counts)
    tokens, actions = (
      float(sum(column)) for column in zip(*counts, strict=True)
    )
    figures = {f"time/{name}_s": s for name, s in self._spent.items()}
    figures["time/step_s"] = seconds / steps
    figures["time/data_s"] = self._spent.get("data", 0.0) / steps
    figures["speed/tokens_per_s"] = tokens / seconds
    figures["speed/action_tokens_per_s"] = actions / seconds
    figures["speed/step_flops"] = self._step_flops
    if self._peak_flops is not None:
      flops = self._step_flops * steps / seconds
      figures["speed/mfu"] = flops / self._peak_flops
    figures["batch/fill"] = tokens / (steps * self._slots)
    self._restart()
    return figures | peak_memory()

  def _restart(self) -> None:
    self._start = self._clock()
    self._spent: dict[str, float] = {}
    self._steps: list[tuple[jax.Array, jax.Array]] = []


def brief(figures: Mapping[str, float]) -> dict[str, float]:
  """Returns the figures that go beside a progress bar, under short names."""
  names = {
    "loss": "loss",
    "speed/tokens_per_s": "tok/s",
    "speed/mfu": "mfu",
    "memory/device_peak_gib": "GiB",
    "memory/process_peak_gib": "GiB",
  }
  return {short: figures[k] for k, short in names.items() if k in figures}


def peak_flops(mesh: Mesh) -> float | None:
  """Returns the bfloat16 FLOPs a second of a mesh, None if not known."""
  devices = list(mesh.devices.flat)
  chip = chips.lookup(devices[0].device_kind)
  if chip is None:
    return None
  # On some TPUs the cores of a chip are devices of their own. They have the
  # same coordinates; other devices have none.
  places = {
    (
      getattr(device, "slice_index", 0),
      tuple(getattr(device, "coords", (device.id,))),
    )
    for device in devices
  }
  return chip.bf16_flops * len(places)


def peak_memory() -> dict[str, float]:
  """Returns the most memory used so far, of the fullest device if it says."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  if peaks:
    return {"memory/device_peak_gib": max(peaks) / _GIB}
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Bytes on macOS, KiB elsewhere.
  scale = 1 if sys.platform == "darwin" else 1024
  return {"memory/process_peak_gib": peak * scale / _GIB}
