"""Many prompts through generation and search, a fixed-shape batch at a time.

Prompts are taken by length, so that a batch wastes little room, and the room
for the prompt is rounded up, so that few shapes are compiled.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from oreo_jax.config import ModelConfig
from oreo_jax.decode.beam import Search, step_beam_search
from oreo_jax.decode.generate import Generation, generate
from oreo_jax.decode.sampling import ANCESTRAL, Sampler
from oreo_jax.models import Params

Prompts = Sequence[Sequence[int]] | Sequence[np.ndarray]
# Called with the number of prompts done since the last call.
OnProgress = Callable[[int], Any]

_ROUND_UP = 16


def batched(
  prompts: Prompts, size: int
) -> Iterator[tuple[np.ndarray, list, int]]:
  """Yields (indices, prompts, room): batches of `size` prompts.

  The last batch is filled up with its last prompt; `indices` has only the
  real ones.

  Raises:
    ValueError: without any prompt.
  """
  if not len(prompts):
    raise ValueError("prompts: expected at least one, got none")
  lengths = np.array([len(prompt) for prompt in prompts])
  order = np.argsort(lengths, kind="stable")
  longest = int(lengths.max())
  for start in range(0, len(order), size):
    indices = order[start : start + size]
    rows = [prompts[i] for i in indices]
    rows += rows[-1:] * (size - len(rows))
    room = -(-max(len(row) for row in rows) // _ROUND_UP) * _ROUND_UP
    yield indices, rows, min(room, longest)


def generate_all(
  policy: Params,
  prompts: Prompts,
  key: jax.Array,
  config: ModelConfig,
  *,
  max_new_tokens: int,
  eos_ids: Sequence[int],
  sampler: Sampler = ANCESTRAL,
  num_samples: int = 1,
  batch_size: int = 512,
  on_progress: OnProgress = lambda count: None,
) -> Generation:
  """Continues every prompt; as `generate`, in the order of `prompts`.

  Args:
    policy: what tokens are drawn from.
    prompts: token ids, ragged.
    key: of the draws; a batch has its own stream.
    config: the policy's architecture.
    max_new_tokens: most tokens of an answer.
    eos_ids: tokens that end an answer.
    sampler: how tokens are drawn.
    num_samples: answers a prompt.
    batch_size: sequences decoded together, num_samples a prompt.
    on_progress: called with the prompts done.

  Returns:
    A Generation of len(prompts) * num_samples rows, prompt-major.
  """
  size = max(min(batch_size // num_samples, len(prompts)), 1)
  parts, order = [], []
  for number, (indices, rows, room) in enumerate(batched(prompts, size)):
    out = generate(
      policy,
      rows,
      jax.random.fold_in(key, number),
      config,
      max_new_tokens=max_new_tokens,
      eos_ids=eos_ids,
      sampler=sampler,
      num_samples=num_samples,
      prompt_length=room,
    )
    parts.append([x[: len(indices) * num_samples] for x in out])
    order.append(
      (indices[:, None] * num_samples + np.arange(num_samples)).ravel()
    )
    on_progress(len(indices))
  return Generation(*_in_order(parts, order))


def search_all(
  policy: Params,
  critic: Params,
  prompts: Prompts,
  key: jax.Array,
  config: ModelConfig,
  *,
  beams: int,
  batch_size: int = 512,
  on_progress: OnProgress = lambda count: None,
  **options: Any,
) -> Search:
  """Searches every prompt; as `step_beam_search`, in the order of `prompts`.

  Args:
    policy: proposes steps.
    critic: judges them.
    prompts: token ids, ragged.
    key: of the draws; a batch has its own stream.
    config: the policy's architecture.
    beams: B.
    batch_size: candidates decoded together, B * B a prompt.
    on_progress: called with the prompts done.
    **options: of `step_beam_search`.

  Returns:
    A Search of len(prompts) rows.
  """
  size = max(min(batch_size // beams**2, len(prompts)), 1)
  parts, order = [], []
  for number, (indices, rows, room) in enumerate(batched(prompts, size)):
    out = step_beam_search(
      policy,
      critic,
      rows,
      jax.random.fold_in(key, number),
      config,
      beams=beams,
      prompt_length=room,
      **options,
    )
    flat = [*out.answers, out.values, out.proposed]
    parts.append([x[: len(indices)] for x in flat])
    order.append(indices)
    on_progress(len(indices))
  *answers, values, proposed = _in_order(parts, order)
  return Search(Generation(*answers), values, proposed)


def _in_order(parts: list[list[np.ndarray]], order: list[np.ndarray]) -> list:
  """Joins the parts and puts row `order[i]` of the whole in its place."""
  place = np.argsort(np.concatenate(order))
  return [np.concatenate(column)[place] for column in zip(*parts, strict=True)]
