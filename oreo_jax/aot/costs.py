"""What one device does in a compiled program: arithmetic, memory, network.

Everything is counted as often as it runs. Arithmetic is that of matrix
products alone, which is what peaks of chips are about.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from oreo_jax.aot import groups, kernels, traffic
from oreo_jax.aot.hlo import (
  Computation,
  Instruction,
  Module,
  root_of,
  trip_count,
)

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)

# How the names of fusions begin that start a collective.
_START = "async-collective-start"


class Collective(NamedTuple):
  """One collective of the program, all its runs together."""

  kind: str  # of `COLLECTIVES`
  sent: float  # bytes that a device sends, all runs together
  payload: float  # bytes of the whole array on a device, one run
  times: float  # runs
  devices: int  # of a group
  crosses_slices: bool
  line: str  # of code it comes from; "" where the compiler does not say
  shape: str  # of the largest array in it


class Costs(NamedTuple):
  """Totals of one device and one call."""

  flops: float
  hbm_bytes: float
  collectives: tuple[Collective, ...]
  unknown_loops: tuple[str, ...]  # counted once: their end depends on data
  uncounted_kernels: int  # custom kernels that do not say what they cost


class _Counter:
  """Walks a program and adds up; `run` is the only way in."""

  def __init__(
    self, module: Module, slices: groups.Slices, loop_lengths: Sequence[int]
  ):
    self._module = module
    self._slices = slices
    self._loop_lengths = loop_lengths
    self.flops = 0.0
    self.hbm_bytes = 0.0
    self.collectives: list[Collective] = []
    self.unknown_loops: list[str] = []
    self.uncounted_kernels = 0
    self._started = _started(module)

  def run(self, name: str, times: float, depth: int = 0) -> None:
    """Counts a computation that is not fused, and all that it calls.

    Args:
      name: of the computation.
      times: how often it runs.
      depth: how many loops whose end depends on data are around it.
    """
    computation = self._module.computations[name]
    for instruction in computation.values():
      if instruction.opcode == "while":
        self._loop(computation, instruction, times, depth)
        continue
      if instruction.opcode in ("call", "conditional", "async-start"):
        # Of a conditional all branches count: an upper bound.
        for called in instruction.calls:
          self.run(called, times, depth)
        continue
      self._arithmetic(computation, instruction, times)
      self.hbm_bytes += times * traffic.bytes_moved(
        self._module, computation, instruction
      )

  def _loop(
    self,
    computation: Computation,
    loop: Instruction,
    times: float,
    depth: int,
  ) -> None:
    trips = trip_count(self._module, computation, loop)
    if trips is None:
      line = self._module.line_of(loop)
      self.unknown_loops.append(line or loop.name)
      lengths = self._loop_lengths
      trips = lengths[depth] if depth < len(lengths) else 1
      depth += 1
    self.run(loop.attribute("body").lstrip("%"), times * trips, depth)

  def _arithmetic(
    self,
    computation: Computation,
    instruction: Instruction,
    times: float,
    fusion: str = "",
  ) -> None:
    """Counts products and collectives, also those inside fusions."""
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if opcode == "fusion":
      for called in instruction.calls:
        inner = self._module.computations[called]
        for item in inner.values():
          self._arithmetic(inner, item, times, instruction.name)
    elif opcode == "dot":
      self.flops += times * _dot_flops(computation, instruction)
    elif opcode == "convolution":
      self.flops += times * _convolution_flops(computation, instruction)
    elif kind in COLLECTIVES:
      # What has started runs on beside other fusions, each of which holds a
      # copy of it; only where it starts it counts.
      goes_on = fusion and not fusion.startswith(_START)
      if not goes_on or _identity(instruction) not in self._started:
        self._collective(computation, instruction, kind, times)
    elif opcode == "send":
      self._send(computation, instruction, times)
    elif kernels.is_kernel(instruction):
      flops = kernels.flops_of(computation, instruction)
      self.flops += times * (flops or 0.0)
      self.uncounted_kernels += flops is None

  def _collective(
    self,
    computation: Computation,
    instruction: Instruction,
    kind: str,
    times: float,
  ) -> None:
    inputs = [
      leaf
      for name in instruction.operands
      if name in computation
      for leaf in computation[name].leaves
    ]
    # What -start returns holds its inputs too.
    is_started = instruction.opcode.endswith("-start")
    outputs = list(instruction.leaves)
    if is_started and kind == "all-gather":
      outputs = outputs[len(inputs) :]
    elif is_started:
      outputs = outputs[: len(inputs)] or inputs
    if kind == "all-reduce" and _is_scattered(computation, instruction):
      kind = "reduce-scatter"
    group = self._slices.group_of(instruction.attributes)
    if kind == "collective-permute":
      group = self._slices.pairs_of(instruction.attributes)
    size = group.size
    arrays = inputs if kind == "reduce-scatter" else outputs
    payload = sum(leaf.bytes for leaf in arrays)
    share = (size - 1) / size if size else 0.0
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}
    largest = max(arrays, key=lambda leaf: leaf.bytes, default=None)
    self.collectives.append(
      Collective(
        kind,
        times * payload * factor.get(kind, share),
        payload,
        times,
        size,
        group.crosses,
        self._line(computation, instruction),
        traffic.shape_text(largest),
      )
    )

  def _send(
    self, computation: Computation, instruction: Instruction, times: float
  ) -> None:
    """Counts what the runtime of several slices takes off a device."""
    kind = re.search(
      r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes
    )
    if kind is None:
      return
    payload = computation[instruction.operands[0]].leaves[0]
    count = self._slices.count
    share = (count - 1) / count
    name = kind[1].lower().replace("_", "-")
    self.collectives.append(
      Collective(
        name,
        times * payload.bytes * (2 * share if name == "all-reduce" else 1),
        payload.bytes,
        times,
        count,
        True,
        self._line(computation, instruction),
        traffic.shape_text(payload),
      )
    )

  def _line(self, computation: Computation, instruction: Instruction) -> str:
    """Returns the line of a collective, or of what it takes.

    The compiler joins small collectives to large ones that have no line.
    """
    line = self._module.line_of(instruction)
    pending = collections.deque(instruction.operands)
    for _ in range(20):
      if line or not pending:
        break
      operand = computation.get(pending.popleft())
      if operand is not None:
        line = self._module.line_of(operand)
        pending.extend(operand.operands)
    return line


def count(
  module: Module,
  slices: groups.Slices,
  *,
  loop_lengths: Sequence[int] = (),
) -> Costs:
  """Counts what one device does in one call.

  Args:
    module: the program.
    slices: which devices are on which slice.
    loop_lengths: how often a loop runs whose end depends on data, as the loop
      over sampled tokens does; the second is for such loops inside such loops,
      and so on. Those that have no entry count once.
  """
  counter = _Counter(module, slices, loop_lengths)
  counter.run(module.entry, 1.0)
  return Costs(
    counter.flops,
    counter.hbm_bytes,
    tuple(counter.collectives),
    tuple(counter.unknown_loops),
    counter.uncounted_kernels,
  )


def _started(module: Module) -> set[tuple[str, ...]]:
  """Returns the collectives that fusions start and other fusions go on with."""
  return {
    _identity(item)
    for computation in module.computations.values()
    for fusion in computation.values()
    if fusion.opcode == "fusion" and fusion.name.startswith(_START)
    for called in fusion.calls
    for item in module.computations[called].values()
    if item.opcode in COLLECTIVES
  }


def _identity(collective: Instruction) -> tuple[str, ...]:
  """Returns what all copies of a collective have in common.

  The channel alone will not do: all of a `shard_map` have the same.
  """
  shapes = map(traffic.shape_text, collective.leaves)
  return collective.opcode, collective.attribute("channel_id"), *shapes


def _dot_flops(computation: Computation, dot: Instruction) -> float:
  """Returns 2 x outputs x contracted elements."""
  left = computation[dot.operands[0]].leaves[0].dims
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
  axes = [int(d) for d in contracted[1].split(",") if d] if contracted else []
  size = math.prod(left[axis] for axis in axes)
  return 2.0 * math.prod(dot.leaves[0].dims) * size


def _convolution_flops(computation: Computation, conv: Instruction) -> float:
  """Returns 2 x the products that a convolution really makes.

  The TPU compiler writes every matrix product as a convolution, and a batched
  one as a window that slides over mostly padding: along each spatial axis only
  the pairs of an output and a window position that meet an input count.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", conv.attributes)
  if labels is None:
    return 0.0
  left = computation[conv.operands[0]].leaves[0].dims
  kernel = computation[conv.operands[1]].leaves[0].dims
  output = conv.leaves[0].dims
  products = output[labels[3].index("b")] * output[labels[3].index("f")]
  products *= kernel[labels[2].index("i")]
  window = _window(conv.attributes)
  for axis in range(sum(label.isdigit() for label in labels[1])):
    name = str(axis)
    products *= _meetings(
      left[labels[1].index(name)],
      kernel[labels[2].index(name)],
      output[labels[3].index(name)],
      {key: values[axis] for key, values in window.items()},
    )
  batches = int(conv.attribute("batch_group_count") or 1)
  return 2.0 * products / batches


def _window(attributes: str) -> dict[str, list[str]]:
  """Reads `window={size=1x2 pad=0_0x1_1}` into values an axis."""
  match = re.search(r"window=\{([^}]*)\}", attributes)
  fields = (item.split("=") for item in match[1].split()) if match else ()
  return {key: values.split("x") for key, values in fields}


def _meetings(
  inputs: int, size: int, outputs: int, window: dict[str, str]
) -> int:
  """Counts pairs of an output and a window position that meet an input."""
  stride = int(window.get("stride", 1))
  dilation = int(window.get("rhs_dilate", 1))
  spread = int(window.get("lhs_dilate", 1))
  low = int(window.get("pad", "0_0").split("_")[0])
  last = (inputs - 1) * spread
  total = 0
  for position in range(size):
    offset = position * dilation - low
    for out in range(outputs):
      place = out * stride + offset
      total += 0 <= place <= last and place % spread == 0
  return total


def _is_scattered(computation: Computation, reduce: Instruction) -> bool:
  """Returns whether each device keeps only its share of a sum.

  A TPU writes a reduce-scatter as a sum with a slice in one fusion, or several
  sums in one with a slice of each.
  """
  names, slices = [reduce.name], []
  for instruction in computation.values():  # users come after what they use
    if not set(names) & set(instruction.operands):
      continue
    if instruction.opcode in ("get-tuple-element", "bitcast"):
      names.append(instruction.name)
    elif instruction.opcode == "dynamic-slice":
      slices.append(instruction.name)
    else:
      return False
  # Outside a fusion a slice comes after the whole sum has been sent.
  root = root_of(computation)
  results = root.operands if root.opcode == "tuple" else (root.name,)
  return bool(slices) and set(results) == set(slices)
