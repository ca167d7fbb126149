"""Many prompts through generation and judging, a batch at a time.

Prompts are taken by length, so that a batch wastes little room, and the room
for the prompt is rounded up, so that few shapes are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import logging

from oreo_jax.config import ModelConfig
from oreo_jax.decode.generate import Generation
from oreo_jax.decode.prompts import Prompts
from oreo_jax.decode.values import answer_values
from oreo_jax.models import Params
from oreo_jax.sharding import batch_shards, rows_that_divide

# Called with the number of prompts done since the last call.
OnProgress = Callable[[int], Any]
Tree = TypeVar("Tree")

_ROUND_UP = 16


class PromptBatch(NamedTuple):
  """Some prompts of similar length; always as many as in other batches."""

  number: int  # which batch, from 0 on
  indices: np.ndarray  # i64[size], their places; the last one fills up the end
  real: int  # how many of them are not filling
  prompts: list  # `size` prompts
  room: int  # tokens to make room for


def prompt_batches(
  prompts: Prompts, size: int, *, prompt_length: int | None = None
) -> Iterator[PromptBatch]:
  """Yields the prompts in batches, the shortest first.

  Args:
    prompts: token ids, ragged.
    size: prompts of a batch.
    prompt_length: room of every batch; by default each has its own.

  Raises:
    ValueError: without any prompt.
  """
  if not len(prompts):
    raise ValueError("prompts: expected at least one, got none")
  lengths = np.array([len(prompt) for prompt in prompts])
  order = np.argsort(lengths, kind="stable")
  longest = int(lengths.max())
  for number, start in enumerate(range(0, len(order), size)):
    indices = order[start : start + size]
    count = len(indices)
    indices = np.pad(indices, (0, size - count), mode="edge")
    rounded = -(-int(lengths[indices].max()) // _ROUND_UP) * _ROUND_UP
    yield PromptBatch(
      number=number,
      indices=indices,
      real=count,
      prompts=[prompts[i] for i in indices],
      room=prompt_length or min(rounded, longest),
    )


def over_batches(
  run: Callable[[PromptBatch], Tree],
  prompts: Prompts,
  *,
  batch_size: int,
  rows_per_prompt: int = 1,
  prompt_length: int | None = None,
  on_progress: OnProgress = lambda count: None,
) -> Tree:
  """Runs a function over batches and puts the results in the prompts' order.

  Args:
    run: from a batch of n prompts to a tree of host arrays, each of n *
      rows_per_prompt rows, prompt-major.
    prompts: token ids, ragged.
    batch_size: rows that are decoded together; more, where the mesh has more
      batch shards than that many rows have prompts.
    rows_per_prompt: of them, belong to one prompt.
    prompt_length: room for a prompt; by default each batch has its own.
    on_progress: called with the prompts done.

  Returns:
    The same tree with len(prompts) * rows_per_prompt rows.
  """
  size = prompts_a_batch(batch_size // rows_per_prompt, len(prompts))
  results, order = [], []
  for batch in prompt_batches(prompts, size, prompt_length=prompt_length):
    rows = batch.real * rows_per_prompt
    results.append(jax.tree.map(lambda x, rows=rows: x[:rows], run(batch)))
    order.append(_rows_of(batch.indices[: batch.real], rows_per_prompt))
    on_progress(batch.real)
  place = np.argsort(np.concatenate(order))
  return jax.tree.map(lambda *xs: np.concatenate(xs)[place], *results)


def prompts_a_batch(wanted: int, available: int) -> int:
  """Returns how many prompts are decoded together: as wanted, or a few more.

  The prompts have to divide over the batch shards of the mesh in force: those
  that do not are computed on every device, with all their activations and
  caches. The batch is rounded up, and the last prompt fills it.
  """
  size = max(min(wanted, available), 1)
  mesh = jax.sharding.get_abstract_mesh()
  rounded = rows_that_divide(size, mesh)
  if rounded > max(wanted, 1):
    logging.log_first_n(
      logging.INFO,
      "%d prompts are decoded together instead of %d, so that they divide over "
      "the %d batch shards of the mesh",
      1,
      rounded,
      size,
      batch_shards(mesh),
    )
  return rounded


def _rows_of(indices: np.ndarray, rows_per_prompt: int) -> np.ndarray:
  """Returns the rows that belong to some prompts, prompt-major."""
  return (
    indices[:, None] * rows_per_prompt + np.arange(rows_per_prompt)
  ).ravel()


def values_all(
  critic: Params,
  prompts: Prompts,
  answers: Generation,
  config: ModelConfig,
  *,
  batch_size: int = 512,
  prompt_length: int | None = None,
  on_progress: OnProgress = lambda count: None,
) -> np.ndarray:
  """Reads V along every answer; as `answer_values`, in the order of `answers`.

  Args:
    critic: a value network.
    prompts: token ids of Q questions.
    answers: of them, a multiple of Q rows, question-major.
    config: architecture of the critic.
    batch_size: answers read together.
    prompt_length: room for a prompt; by default each batch has its own.
    on_progress: called with the prompts done.

  Returns:
    f32[R, max_new_tokens + 1], column i is V after i tokens of the answer.
  """
  samples = len(answers.lengths) // len(prompts)

  def run(batch: PromptBatch) -> np.ndarray:
    rows = _rows_of(batch.indices, samples)
    return answer_values(
      critic,
      batch.prompts,
      Generation(*(x[rows] for x in answers)),
      config,
      prompt_length=batch.room,
    )

  return over_batches(
    run,
    prompts,
    batch_size=batch_size,
    rows_per_prompt=samples,
    prompt_length=prompt_length,
    on_progress=on_progress,
  )
