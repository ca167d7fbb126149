"""Which answer a free row begins next: pure Python, the same on every host.

A row belongs to a group that holds one prompt. It takes the next sample of its
group's request; when none is left and the whole group is free, the group reads
the next prompt. Towards the end, when no prompt is left that nobody has begun,
a free group helps with the request that has most samples left, so that no row
waits for another one's queue. A sample is the same wherever it is drawn.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from oreo_jax.decode.sampling import ANCESTRAL, Sampler


class Request(NamedTuple):
  """A prompt to answer, some of its samples, and how they are drawn."""

  prompt: np.ndarray  # i32[L], at least one token
  problem: int  # its number, on which the draws depend
  samples: Sequence[int]  # the numbers of the samples to draw
  sampler: Sampler = ANCESTRAL
  max_new_tokens: int = 128  # of each sample, end-of-sequence included


class Assignment(NamedTuple):
  """What a row begins."""

  row: int
  request: int  # its place among the requests
  sample: int
  reads_prompt: bool  # the row's group has to read the prompt first


class Schedule:
  """Hands samples to rows that are free."""

  def __init__(
    self, requests: Sequence[Request], groups: int, rows_per_group: int
  ):
    """Prepares the queue; every row is free.

    Args:
      requests: what to answer; the first ones begin first.
      groups: G.
      rows_per_group: rows that share a prompt.
    """
    self._left = [collections.deque(request.samples) for request in requests]
    self._fresh = collections.deque(
      index for index, left in enumerate(self._left) if left
    )
    self._rows_per_group = rows_per_group
    self._request = [-1] * groups  # of which each group holds the prompt
    self._active = [0] * groups  # rows of each group
    self.waiting = sum(len(left) for left in self._left)

  def assign(self, free_rows: Iterable[int]) -> Iterator[Assignment]:
    """Yields what free rows begin; some may stay free.

    Args:
      free_rows: rows that are not active; those that have ended were `freed`.
    """
    for row in free_rows:
      group = row // self._rows_per_group
      request, reads_prompt = self._request[group], False
      if request < 0 or not self._left[request]:
        # Another row of the group may still need the prompt that it holds.
        if self._active[group]:
          continue
        request, reads_prompt = self._next_request(), True
        if request < 0:
          continue
        self._request[group] = request
      self._active[group] += 1
      self.waiting -= 1
      sample = self._left[request].popleft()
      yield Assignment(row, request, sample, reads_prompt)

  def freed(self, row: int) -> None:
    """Notes that a row has ended."""
    self._active[row // self._rows_per_group] -= 1

  def _next_request(self) -> int:
    """Returns the request a free group turns to, -1 without any."""
    if self._fresh:
      return self._fresh.popleft()
    begun = {index for index in self._request if index >= 0}
    most = max(begun, key=lambda i: (len(self._left[i]), -i), default=-1)
    return most if most >= 0 and self._left[most] else -1
