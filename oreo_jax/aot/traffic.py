"""Bytes between memory and cores: what each instruction reads and writes.

Fused instructions keep what is between them in the chip, so a fusion moves its
operands and its results. Where it only slices an operand, as a layer of a scan
slices the stacked weights, it moves the slice; what it updates in place costs
the update. Arrays that the compiler has put into the chip's own memory do not
count.
"""

from __future__ import annotations

from collections.abc import Iterator

from oreo_jax.aot import kernels
from oreo_jax.aot.hlo import Computation, Instruction, Leaf, Module, root_of

# Nothing moves: names, containers, and the second halves of what has started.
_FREE = frozenset(
  {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "recv",
    "replica-id",
    "tuple",
  }
)
_SLICES = ("dynamic-slice", "gather", "slice")
# Where the scattered or updated array stands among the operands, and what is
# put into it: (place of the array, place of the update).
_UPDATES = {"dynamic-update-slice": (0, 1), "scatter": (0, 2)}
_FREE_CALLS = (
  "AllocateBuffer",
  "AssumeGatherIndicesInBound",
  "AsyncCollectiveDone",
  "AsyncCollectiveStart",
)


def shape_text(leaf: Leaf | None) -> str:
  """Returns "f32[4,8]"."""
  return f"{leaf.dtype}[{','.join(map(str, leaf.dims))}]" if leaf else ""


def bytes_moved(
  module: Module, computation: Computation, instruction: Instruction
) -> float:
  """Returns the bytes an instruction reads from and writes to HBM, once."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith(("-done", "-update")):
    return 0.0
  if opcode == "custom-call" and any(
    f'"{name}"' in instruction.attributes for name in _FREE_CALLS
  ):
    return 0.0
  if kernels.is_kernel(instruction):
    moved = kernels.bytes_moved(computation, instruction)
    if moved is not None:
      return moved
  if opcode == "fusion":
    inner = module.computations[instruction.calls[0]]
    read = sum(
      _parameter_bytes(module, inner, place, _in_memory(computation, name))
      for place, name in enumerate(instruction.operands)
    )
    return read + _result_bytes(module, inner, instruction)
  if opcode in _SLICES:
    moved = _bytes(instruction.leaves)
    source = computation[instruction.operands[0]].leaves
    return moved + (
      sum(x.bytes for x in instruction.leaves)
      if any(leaf.space == 0 for leaf in source)
      else 0.0
    )
  if opcode in _UPDATES:
    update = computation[instruction.operands[_UPDATES[opcode][1]]].leaves
    return _bytes(update) + (
      sum(leaf.bytes for leaf in update)
      if any(leaf.space == 0 for leaf in instruction.leaves)
      else 0.0
    )
  read = sum(_in_memory(computation, name) for name in instruction.operands)
  results = instruction.leaves
  if opcode.endswith("-start"):
    # Its tuple names the inputs again, and flags: one result counts.
    place = 1 if opcode == "all-gather-start" and len(results) > 1 else 0
    results = results[place : place + 1]
  return read + _bytes(results)


def _bytes(leaves: tuple[Leaf, ...]) -> float:
  return sum(leaf.bytes for leaf in leaves if leaf.space == 0)


def _in_memory(computation: Computation, name: str) -> float:
  return _bytes(computation[name].leaves) if name in computation else 0.0


def _parameter_bytes(
  module: Module, inner: Computation, place: int, full: float
) -> float:
  """Returns what a fused computation reads of one of its parameters.

  Args:
    module: the program.
    inner: the fused computation.
    place: the number of the parameter.
    full: its bytes in HBM; 0 if it is inside the chip.
  """
  parameter = next(
    (
      i
      for i in inner.values()
      if i.opcode == "parameter" and i.literal == str(place)
    ),
    None,
  )
  if not full or parameter is None:
    return 0.0
  total = 0.0
  for user, name in _users(module, inner, parameter.name):
    where = user.operands.index(name)
    if user.opcode in _SLICES and where == 0:
      # In the type that lies in memory, not in the one it is converted to.
      (held,) = parameter.leaves
      total += sum(held._replace(dims=leaf.dims).bytes for leaf in user.leaves)
    elif user.opcode in _UPDATES and where == _UPDATES[user.opcode][0]:
      continue
    elif user.opcode == "fusion":
      nested = module.computations[user.calls[0]]
      total += _parameter_bytes(module, nested, where, full)
    elif user.opcode == "tuple":
      continue  # handed through
    else:
      return full
  return min(total, full)


def _users(
  module: Module, inner: Computation, name: str
) -> Iterator[tuple[Instruction, str]]:
  """Yields the users of a value, through what changes its form alone.

  Inside a fusion a value is made where it is used: of an array that is
  converted whole and then sliced, the slice is read.
  """
  for user in inner.values():
    if name not in user.operands:
      continue
    if _changes_form(module, user) and user is not root_of(inner):
      yield from _users(module, inner, user.name)
    else:
      yield user, name


def _changes_form(module: Module, instruction: Instruction) -> bool:
  """Returns whether it gives each number that it gets, in its place."""
  if instruction.opcode == "fusion":
    return all(
      each.opcode == "parameter" or _changes_form(module, each)
      for each in module.computations[instruction.calls[0]].values()
    )
  return instruction.opcode in ("bitcast", "convert", "copy")


def _result_bytes(
  module: Module, inner: Computation, fusion: Instruction
) -> float:
  """Returns what a fusion writes to HBM."""
  root = root_of(inner)
  if root.opcode == "tuple":
    sources = [inner.get(name) for name in root.operands]
  else:
    sources = [root]
  total = 0.0
  for leaf, source in zip(fusion.leaves, sources, strict=False):
    while source is not None and source.opcode == "bitcast":
      source = inner.get(source.operands[0])
    if leaf.space or source is None or source.opcode == "parameter":
      continue
    if source.opcode in _UPDATES:
      update = inner[source.operands[_UPDATES[source.opcode][1]]]
      total += sum(x.bytes for x in update.leaves)
    elif source.opcode == "fusion" and len(source.leaves) == 1:
      nested = module.computations[source.calls[0]]
      total += _result_bytes(module, nested, source._replace(leaves=(leaf,)))
    else:
      total += leaf.bytes
  return total
