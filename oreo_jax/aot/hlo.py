"""Reads the text of a compiled program: instructions, calls, loops, lines.

The text is what `compiled.as_text()` gives. XLA's own cost analysis counts the
body of a loop once, so the reader here is what loops are counted with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Bits of an element; a predicate takes a byte, and a token nothing.
_BITS = {
  **{kind: 8 for kind in ("pred", "s8", "u8")},
  **{kind: 16 for kind in ("s16", "u16", "f16", "bf16")},
  **{kind: 32 for kind in ("s32", "u32", "f32")},
  **{kind: 64 for kind in ("s64", "u64", "f64", "c64")},
  **{kind: 4 for kind in ("s4", "u4", "f4e2m1fn")},
  **{kind: 2 for kind in ("s2", "u2")},
  **{kind: 1 for kind in ("s1", "u1")},
  "c128": 128,
  "token": 0,
  "opaque": 0,
}
_LEAF = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*-> .*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")


class Leaf(NamedTuple):
  """An array in the shape of an instruction."""

  dtype: str
  dims: tuple[int, ...]
  space: int  # of memory: 0 is HBM, others are inside the chip

  @property
  def bytes(self) -> int:
    """Bytes without the padding of tiles."""
    return (math.prod(self.dims) * _BITS.get(self.dtype, 8) + 7) // 8


class Instruction(NamedTuple):
  """A line of a computation."""

  name: str
  opcode: str
  leaves: tuple[Leaf, ...]  # one, or those of a tuple
  operands: tuple[str, ...]  # names in the same computation
  literal: str  # what stands in the parentheses: a constant's value
  attributes: str  # all that comes behind them
  is_root: bool

  def attribute(self, name: str) -> str:
    """Returns the text of an attribute up to the next comma, or ""."""
    match = re.search(rf"\b{name}=([^,\s]+)", self.attributes)
    return match[1] if match else ""

  @property
  def calls(self) -> tuple[str, ...]:
    """The computations it runs, without the functions that reductions map."""
    names = []
    for attribute in ("calls", "body", "true_computation", "false_computation"):
      names += _NAME.findall(self.attribute(attribute))
    if self.opcode == "call":
      names += _NAME.findall(self.attribute("to_apply"))
    branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
    return (*names, *(_NAME.findall(branches[1]) if branches else ()))


Computation = dict[str, Instruction]  # in the order of the text


class Module(NamedTuple):
  """A compiled program."""

  computations: Mapping[str, Computation]
  entry: str
  frames: Mapping[int, tuple[str, int, int]]  # id -> file, line, parent's id

  def line_of(
    self, instruction: Instruction, inside: str = "/oreo_jax/"
  ) -> str:
    """Returns the line of code an instruction comes from.

    Args:
      instruction: any.
      inside: of the frames of the stack the innermost whose file has this in
        its path is meant; without one, the innermost of all.

    Returns:
      "train/step.py:56", or "" where the compiler does not say.
    """
    match = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
    if match is None:
      file = re.search(r'source_file="([^"]*)"', instruction.attributes)
      line = re.search(r"source_line=(\d+)", instruction.attributes)
      return f"{_short(file[1], inside)}:{line[1]}" if file and line else ""
    frame, first = int(match[1]), ""
    seen = set()
    while frame in self.frames and frame not in seen:
      seen.add(frame)
      path, line_number, parent = self.frames[frame]
      place = f"{_short(path, inside)}:{line_number}"
      if inside in path:
        return place
      first = first or place
      frame = parent
    return first


def _short(path: str, inside: str) -> str:
  return path.rsplit(inside, 1)[-1]


def parse(text: str) -> Module:
  """Reads the text of a module.

  Raises:
    ValueError: if it has no entry.
  """
  computations: dict[str, Computation] = {}
  entry, current = "", None
  for line in text.splitlines():
    if current is None:
      header = _HEADER.match(line) if "->" in line else None
      if header:
        current = computations.setdefault(header[2], {})
        entry = header[2] if header[1] else entry
    elif line.rstrip() == "}" or line.startswith("}, "):
      # What kernels say of themselves is written over several lines, the last
      # of which starts with two brackets: the computation goes on.
      current = None
    else:
      instruction = _instruction(line)
      if instruction:
        current[instruction.name] = instruction
  if not entry:
    raise ValueError("the text of the program has no ENTRY computation")
  return Module(computations, entry, _frames(text))


def _instruction(line: str) -> Instruction | None:
  left, equals, right = line.strip().partition(" = ")
  if not equals:
    return None
  # A tuple's shape has blanks and parentheses, any other shape has no blank.
  end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
  shape, rest = right[:end], right[end:].lstrip()
  opening = rest.find("(")
  if opening < 0:
    return None
  closing = _closing(rest, opening)
  inner = rest[opening + 1 : closing]
  return Instruction(
    name=left.removeprefix("ROOT ").lstrip("%"),
    opcode=rest[:opening],
    leaves=tuple(_leaves(shape)),
    operands=tuple(_NAME.findall(inner)),
    literal=inner,
    attributes=rest[closing + 1 :],
    is_root=left.startswith("ROOT "),
  )


def _closing(text: str, opening: int) -> int:
  """Returns the place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.finditer(r"[()]", text[opening:]):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return opening + match.start()
  return len(text)


def _leaves(shape: str) -> Iterator[Leaf]:
  for dtype, dims, layout in _LEAF.findall(shape):
    space = re.search(r"S\((\d+)\)", layout)
    yield Leaf(
      dtype,
      tuple(int(d.lstrip("<=")) for d in dims.split(",") if d),
      int(space[1]) if space else 0,
    )


def _frames(text: str) -> dict[int, tuple[str, int, int]]:
  """Reads the tables of files, places and frames at the head of the text."""
  files = dict(_strings(_table(text, "FileNames")))
  places = {
    int(number): (files.get(int(file), ""), int(line))
    for number, file, line in re.findall(
      r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)",
      _table(text, "FileLocations"),
      re.MULTILINE,
    )
  }
  return {
    int(number): (*places.get(int(place), ("", 0)), int(parent or 0))
    for number, place, parent in re.findall(
      r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?",
      _table(text, "StackFrames"),
      re.MULTILINE,
    )
  }


def _table(text: str, title: str) -> str:
  match = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
  return match[1] if match else ""


def _strings(table: str) -> Iterator[tuple[int, str]]:
  for number, value in re.findall(r'^(\d+) "(.*)"$', table, re.MULTILINE):
    yield int(number), value


def root_of(computation: Computation) -> Instruction:
  """Returns the instruction whose value a computation returns."""
  for instruction in computation.values():
    if instruction.is_root:
      return instruction
  return list(computation.values())[-1]


def trip_count(
  module: Module, computation: Computation, loop: Instruction
) -> int | None:
  """Returns how often the body of a `while` runs.

  The compiler says so, or the loop counts: from where, to where and in which
  steps is then read off the initial tuple, the condition and the body. (The
  loops of windowed products count in steps of two.)

  Args:
    module: the program.
    computation: that has the loop.
    loop: the `while`.

  Returns:
    The number, or None for a loop that ends where its data says.
  """
  known = re.search(
    r'"?known_trip_count"?\s*[:=]\s*\{"?n"?\s*:\s*"?(\d+)', loop.attributes
  )
  if known:
    return int(known[1])
  condition = module.computations.get(loop.attribute("condition").lstrip("%"))
  body = module.computations.get(loop.attribute("body").lstrip("%"))
  if not condition or not body:
    return None
  first = _through_copies(computation, loop.operands[0])
  initial = first.operands if first and first.opcode == "tuple" else ()

  def start_of(index: int) -> int | None:
    return (
      _constant(computation, initial[index]) if index < len(initial) else None
    )

  test, names = _comparison(module, condition)
  if test is None:
    return None
  counter = _element(condition, names[0])
  bound = _constant(condition, names[1])
  if bound is None and (carried := _element(condition, names[1])) is not None:
    bound = start_of(carried)  # a bound that the loop carries along
  if counter is None or bound is None:
    return None
  start, step = start_of(counter) or 0, _step(module, body, counter)
  direction = test.attribute("direction")
  distance = {"LT": bound - start, "LE": bound - start + 1}.get(direction)
  return None if distance is None else max(-(-distance // step), 0)


def _comparison(
  module: Module, condition: Computation
) -> tuple[Instruction | None, tuple[str, ...]]:
  """Returns the test of a loop, and the names that are compared outside it."""
  root = _through_copies(condition, root_of(condition).name)
  if root is None:
    return None, ()
  if root.opcode == "compare":
    return root, root.operands
  if root.opcode == "fusion":
    inner = module.computations[root.calls[0]]
    test = root_of(inner)
    names = []
    for name in test.operands:
      operand = inner[name]
      if operand.opcode == "parameter":
        names.append(root.operands[int(operand.literal)])
    if test.opcode == "compare" and len(names) == 2:
      return test, tuple(names)
  return None, ()


def _step(module: Module, body: Computation, counter: int) -> int:
  """Returns what a body adds to the counter of its loop."""
  root = root_of(body)
  if root.opcode != "tuple":
    return 1
  update = _through_copies(body, root.operands[counter])
  scope: Computation = body
  if update and update.opcode == "fusion":
    scope = module.computations[update.calls[0]]
    update = _through_copies(scope, root_of(scope).name)
  if update is None or update.opcode != "add":
    return 1
  amounts = [_constant(scope, name) for name in update.operands]
  return next((amount for amount in amounts if amount), 1)


def _through_copies(scope: Computation, name: str) -> Instruction | None:
  """Follows a value to where it is made."""
  while (instruction := scope.get(name)) is not None:
    if instruction.opcode not in ("copy", "bitcast", "convert", "copy-done"):
      return instruction
    name = instruction.operands[0]
  return None


def _constant(scope: Computation, name: str) -> int | None:
  made = _through_copies(scope, name)
  is_constant = made and made.opcode == "constant"
  if made and is_constant and re.fullmatch(r"-?\d+", made.literal):
    return int(made.literal)
  return None


def _element(scope: Computation, name: str) -> int | None:
  """Returns which element of the carried tuple a value is, if it is one."""
  made = _through_copies(scope, name)
  if made is None or made.opcode != "get-tuple-element":
    return None
  return int(made.attribute("index"))
