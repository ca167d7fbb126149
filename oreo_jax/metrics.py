"""Metrics of a run: JSON lines, TensorBoard, optional Weights & Biases.

The JSONL file is the record that the report and a resumed run read; TensorBoard
and Weights & Biases are views. A row is `{"step": int, "<metric>": float}`, and
a figure that is not finite is written as null, so that every line is JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from oreo_jax import files

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
  """Writes one row a step; a context manager.

  A row is on disk when `write` returns. A resumed run first drops the rows that
  the interrupted one wrote after its last checkpoint, so that no step appears
  twice.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    resume_step: int | None = None,
    tensorboard: bool = True,
    wandb: Mapping[str, Any] | None = None,
    enabled: bool = True,
  ):
    """Opens the files.

    Args:
      directory: the stage's folder; made if missing.
      resume_step: steps already done: rows with a greater step are dropped.
        None starts afresh.
      tensorboard: whether to write TensorBoard event files too.
      wandb: arguments of `wandb.init` ({"project": ...}); None for none.
      enabled: whether to write at all; give `hosts.is_chief()`.

    Raises:
      ValueError: if wandb is asked for and not installed.
    """
    self._file: TextIO | None = None
    self._events: Any = None
    self._wandb: Any = None
    if not enabled:
      return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE_NAME
    if wandb is not None:
      self._wandb = _start_wandb(directory, wandb)
    _truncate(path, resume_step)
    self._file = path.open("a", encoding="utf-8")
    if tensorboard:
      # Slow to import, and a disabled writer never needs it.
      import tensorboardX

      first = 0 if resume_step is None else resume_step + 1
      self._events = tensorboardX.SummaryWriter(
        str(directory), purge_step=first
      )

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes one row.

    Args:
      step: number of steps done.
      metrics: scalars (Python, NumPy or JAX) by name; a name with a slash
        ("loss/value") groups in TensorBoard.

    Raises:
      ValueError: for a metric that is not a scalar, or called "step".
    """
    if self._file is None:
      return
    row = {name: _scalar(name, metric) for name, metric in metrics.items()}
    finite = {
      name: number if math.isfinite(number) else None
      for name, number in row.items()
    }
    line = json.dumps({"step": int(step), **finite}, allow_nan=False)
    self._file.write(line + "\n")
    self._file.flush()
    if self._events is not None:
      for name, number in row.items():
        self._events.add_scalar(name, number, int(step))
    if self._wandb is not None:
      self._wandb.log(row, step=int(step))

  def close(self) -> None:
    """Closes the files; a second call does nothing."""
    for sink in (self._file, self._events):
      if sink is not None:
        sink.close()
    if self._wandb is not None:
      self._wandb.finish()
    self._file = self._events = self._wandb = None

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *unused_error: object) -> None:
    self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
  """Reads the rows of a metrics file, null as nan.

  A last line without its line break was torn by a kill in mid-write and is left
  out; a broken line anywhere else is an error.

  Args:
    path: a `metrics.jsonl`.

  Returns:
    The rows in file order, each with an int under "step".

  Raises:
    ValueError: if a row is not one, with file and line.
  """
  rows = []
  lines = Path(path).read_text(encoding="utf-8").split("\n")
  # What follows the last line break: empty, or torn.
  for number, line in enumerate(lines[:-1], start=1):
    try:
      row = json.loads(line)
      step = int(row.pop("step"))
      rows.append(
        {"step": step}
        | {
          name: math.nan if figure is None else float(figure)
          for name, figure in row.items()
        }
      )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f'{path}:{number}: expected {{"step": int, "<metric>": number}}, got '
        f"{line[:80]!r}; delete the line to go on"
      ) from error
  return rows


def _scalar(name: str, metric: Any) -> float:
  if name == "step":
    raise ValueError('metrics: "step" names the step itself; rename the metric')
  array = np.asarray(metric)
  if array.size != 1 or array.dtype.kind in "OSU":
    raise ValueError(
      f"metrics[{name!r}]: expected one number, got shape {array.shape} and "
      f"type {array.dtype}; reduce it first"
    )
  return float(array.reshape(()))


def _truncate(path: Path, resume_step: int | None) -> None:
  """Drops the rows after `resume_step`; without one, all of them."""
  if not path.exists():
    return
  lines: list[str] = []
  if resume_step is not None:
    # `read_metrics` leaves out a torn last line, and zip with it.
    pairs = zip(
      path.read_text(encoding="utf-8").split("\n"),
      read_metrics(path),
      strict=False,
    )
    lines = [line for line, row in pairs if row["step"] <= resume_step]
  files.write_text(path, "".join(f"{line}\n" for line in lines))


def _start_wandb(directory: Path, options: Mapping[str, Any]) -> Any:
  try:
    import wandb
  except ImportError as error:
    raise ValueError(
      "metrics: wandb was asked for and is not installed; pip install wandb, "
      "or leave the wandb options out"
    ) from error
  return wandb.init(**{"dir": str(directory), **options})
