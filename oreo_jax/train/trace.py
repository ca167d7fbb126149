"""A profiler trace of a few steps, for TensorBoard or Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from oreo_jax.config import ConfigError


class StepTrace:
  """Writes a trace of the steps `profile` names; a context manager.

  Only the named steps are in it: the trace starts when the step before is
  done, and ends when the last one is.
  """

  def __init__(
    self,
    profile: tuple[int, ...],
    directory: pathlib.Path,
    *,
    done: int,
    num_steps: int,
    enabled: bool = True,
  ):
    """Checks that the steps are still to come.

    Args:
      profile: the first and the last step, counted from 1; empty for none.
      directory: where the trace goes.
      done: steps that an earlier call has done.
      num_steps: of the whole stage.
      enabled: whether to write at all; give `hosts.is_chief()`.

    Raises:
      ConfigError: if the stage has not that many steps.
    """
    self._directory = directory
    self._first, self._last = profile or (0, 0)
    self._is_tracing = False
    if self._last > num_steps:
      raise ConfigError(
        f"--profile={self._first}:{self._last}: this stage has {num_steps} "
        f"steps; name steps up to {num_steps}"
      )
    if profile and self._first <= done:
      logging.warning(
        "no trace of steps %d to %d is written: %d are done already; "
        "--overwrite does the stage again",
        self._first,
        self._last,
        done,
      )
    if not enabled:
      self._first = self._last = 0

  @contextlib.contextmanager
  def step(self, number: int, before: Any) -> Iterator[None]:
    """Surrounds the call that asks for a step.

    Args:
      number: of the step, counted from 1.
      before: arrays that the step before makes.
    """
    if number == self._first:
      jax.block_until_ready(before)
      jax.profiler.start_trace(self._directory)
      self._is_tracing = True
    if not self._is_tracing:
      yield
      return
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def end(self, number: int, results: Any) -> None:
    """Ends the trace if this step is its last.

    Args:
      number: of the step, counted from 1.
      results: arrays that the step makes.
    """
    if self._is_tracing and number == self._last:
      jax.block_until_ready(results)
      self.close()
      logging.info(
        "trace of steps %d to %d: %s", self._first, number, self._directory
      )

  def close(self) -> None:
    """Writes what has been traced; a second call does nothing."""
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()

  def __enter__(self) -> StepTrace:
    return self

  def __exit__(self, *unused_error: object) -> None:
    self.close()
