"""Which devices take part in a collective, and whether they span slices."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
  """The devices of one collective."""

  size: int  # of each of its groups
  crosses: bool  # whether any of them has devices of two slices


class Slices:
  """Knows the slice of every partition of a program."""

  def __init__(self, slice_of: Sequence[int]):
    """Takes the slice of each partition, in the order of the mesh."""
    self._slice_of = np.asarray(slice_of)
    self.count = len(set(slice_of))

  def group_of(self, attributes: str) -> Group:
    """Reads `replica_groups` of an instruction's attributes.

    Three ways of writing them are known: lists `{{0,1},{2,3}}`, a reshaped
    and transposed range `[2,2]<=[2,2]T(1,0)`, and axes of a mesh.
    """
    members = _members(attributes, len(self._slice_of))
    slices = self._slice_of[members]
    return Group(members.shape[1], bool((slices != slices[:, :1]).any()))

  def pairs_of(self, attributes: str) -> Group:
    """Reads `source_target_pairs`, of which a device is in one group of two."""
    match = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    pairs = np.array(
      re.findall(r"(\d+),(\d+)", match[1] + "}" if match else ""), int
    ).reshape(-1, 2)
    slices = self._slice_of[pairs]
    return Group(2, bool((slices[:, 0] != slices[:, 1]).any()))


def _members(attributes: str, devices: int) -> np.ndarray:
  """Returns the partitions of every group, one group a row."""
  everyone = np.arange(devices)[None]
  lists = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes)
  if lists:
    rows = re.findall(r"\{([\d, ]+)\}", lists[1])
    return np.array([[int(d) for d in row.split(",")] for row in rows])
  iota = re.search(
    r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes
  )
  if iota:
    return _iota(iota[1])
  mesh = re.search(
    r"replica_groups=@?mesh\[([^\]]*)\]\s*(\{device_ids=\(?([^})]*)[})]*)?"
    r"\s*\{([^}]*)\}",
    attributes,
  )
  if mesh is None:
    return everyone
  axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
  sizes = [int(size) for _, size in axes]
  order = _iota(mesh[3]).reshape(-1) if mesh[3] else np.arange(devices)
  if math.prod(sizes) != devices:
    return everyone
  # An axis may be named in part: 'x':(2)4 is the middle 4 of an axis that is
  # split after its first 2.
  wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[4])
  shape: list[int] = []
  chosen: list[int] = []
  for name, size in zip([n for n, _ in axes], sizes, strict=True):
    pieces = [
      (int(before), int(own)) if own else (1, size)
      for axis, before, own in wanted
      if axis == name
    ]
    done = 1
    for before, own in sorted(pieces):
      shape += [before // done, own]
      chosen.append(len(shape) - 1)
      done = before * own
    shape.append(size // done)
  grid = order.reshape(shape)
  grid = np.moveaxis(grid, chosen, range(-len(chosen), 0))
  return grid.reshape(-1, math.prod(shape[axis] for axis in chosen))


def _iota(text: str) -> np.ndarray:
  """Reads `[2,8]<=[4,4]T(1,0)`: a range, reshaped, transposed, reshaped."""
  match = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?.*", text)
  if match is None:
    raise ValueError(f"replica groups {text!r}: expected [m,n]<=[...]T(...)")
  shape, source, order = (
    [int(d) for d in (match[i] or "").split(",") if d] for i in (1, 2, 3)
  )
  array = np.arange(math.prod(source)).reshape(source)
  return array.transpose(order or range(len(source))).reshape(shape)
