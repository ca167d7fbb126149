"""Prompts: as arrays, and as a level of text that several rows share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.models import Cache, Params, Shared
from oreo_jax.sharding import constrain_batch

# Token ids of each prompt, ragged, or all of one length.
Prompts = Sequence[Sequence[int]] | Sequence[np.ndarray] | np.ndarray


def pad_prompts(
  prompts: Prompts, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts as (tokens i32[R, P], lengths i32[R]), left-aligned.

  Args:
    prompts: token ids, none empty.
    length: P; by default the longest prompt.

  Raises:
    ValueError: if a prompt is empty or longer than `length`.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  if not len(lengths) or not lengths.min():
    raise ValueError("prompts: every prompt needs at least one token")
  length = int(lengths.max()) if length is None else length
  if lengths.max() > length:
    row = int(lengths.argmax())
    raise ValueError(
      f"prompts: prompt {row} has {lengths[row]} tokens, room is {length}"
    )
  tokens = np.zeros((len(prompts), length), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  return tokens, lengths


def read_prompts(
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  config: ModelConfig,
  *,
  start: jax.Array | None = None,
  stream_at: int | None = None,
) -> tuple[models.Output, Shared]:
  """Reads the first `lengths` tokens of each prompt.

  Args:
    params: of a policy or a value network.
    prompts: i32[P, W].
    lengths: i32[P]. A policy reads all but the last token of a prompt: that is
      fed to the first decoding step, so that every step, the first included,
      feeds one token and reads one distribution.
    config: the architecture.
    start: as in `models.prefill`.
    stream_at: as in `models.prefill`.

  Returns:
    (what `models.prefill` does, the prompts as a level that rows can share).
  """
  prompts, lengths = constrain_batch(prompts), constrain_batch(lengths)
  out = models.prefill(
    params, prompts, config, lengths=lengths, start=start, stream_at=stream_at
  )
  # It gives a cache.
  cache = models.constrain_cache(cast(Cache, out.cache))
  return out, Shared(cache, lengths)
