"""Generation of one batch: a prefill, then one loop over the KV cache.

`Engine` is what generates for many prompts; this is one batch of it, where all
rows begin together and the batch ends with its longest row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax.config import ModelConfig
from oreo_jax.decode.grow import Text, grow, start_rows
from oreo_jax.decode.prompts import Prompts, pad_prompts, read_prompts
from oreo_jax.decode.sampling import (
  ANCESTRAL,
  Sampler,
  Sampling,
  row_keys,
  sampling_rows,
)
from oreo_jax.hosts import to_host
from oreo_jax.models import Params


class Generation(NamedTuple):
  """Answers on the host."""

  tokens: np.ndarray  # i32[R, max_new_tokens], the answers; 0 beyond the end
  lengths: np.ndarray  # i32[R], tokens of the answer, end-of-sequence included
  finished: np.ndarray  # bool[R]; False: cut off at max_new_tokens
  logps: np.ndarray  # f32[R, max_new_tokens], 0 beyond the end

  def answers(self) -> list[np.ndarray]:
    """Returns the tokens of each answer, without the end-of-sequence."""
    ends = self.lengths - self.finished
    return [row[:end] for row, end in zip(self.tokens, ends, strict=True)]


def generate(
  params: Params,
  prompts: Prompts,
  key: jax.Array,
  config: ModelConfig,
  *,
  max_new_tokens: int,
  eos_ids: Sequence[int],
  sampler: Sampler = ANCESTRAL,
  num_samples: int = 1,
  prompt_length: int | None = None,
  problems: Sequence[int] | np.ndarray | None = None,
) -> Generation:
  """Continues prompts.

  Args:
    params: the policy.
    prompts: token ids of each prompt, ragged.
    key: a `jax.random.key`. A token's draw is a function of the key, the
      number of the prompt, of the sample and of the token, and of nothing else
      in the batch.
    config: the policy's architecture.
    max_new_tokens: most tokens of an answer, end-of-sequence included.
    eos_ids: tokens that end an answer.
    sampler: how tokens are drawn; temperature 0 is greedy.
    num_samples: answers a prompt; the prompt is read and kept once.
    prompt_length: room for the prompt; fix it over calls to compile once.
    problems: the number of each prompt; 0, 1, ... by default.

  Returns:
    A Generation of len(prompts) * num_samples rows, the samples of one prompt
    side by side.
  """
  tokens, lengths = pad_prompts(prompts, prompt_length)
  if problems is None:
    problems = np.arange(len(lengths))
  rows = run_batch(
    params,
    tokens,
    lengths,
    row_keys(
      key,
      np.repeat(np.asarray(problems, np.int32), num_samples),
      np.tile(np.arange(num_samples, dtype=np.int32), len(lengths)),
    ),
    sampling_rows([sampler] * len(lengths) * num_samples),
    config=config,
    eos_ids=tuple(eos_ids),
    max_new_tokens=max_new_tokens,
  )
  return to_generation(*to_host(rows))


def to_generation(
  tokens: np.ndarray,
  lengths: np.ndarray,
  finished: np.ndarray,
  logps: np.ndarray,
) -> Generation:
  """Returns rows as a Generation, with 0 beyond the end of each."""
  inside = np.arange(tokens.shape[1])[None] < lengths[:, None]
  return Generation(
    tokens=np.where(inside, tokens, 0),
    lengths=lengths,
    finished=finished,
    logps=np.where(inside, logps, 0.0),
  )


@functools.partial(
  jax.jit, static_argnames=("config", "eos_ids", "max_new_tokens")
)
def run_batch(
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
  sampling: Sampling,
  *,
  config: ModelConfig,
  eos_ids: tuple[int, ...],
  max_new_tokens: int,
) -> tuple[jax.Array, ...]:
  """Runs `generate` as one program, of which the outputs stay on the devices.

  Args:
    params: the policy.
    tokens: i32[P, W], prompts.
    lengths: i32[P], tokens of each prompt.
    keys: key[R] of the rows, those of a prompt side by side.
    sampling: of R rows.
    config: the policy's architecture.
    eos_ids: as in `generate`.
    max_new_tokens: as in `generate`.

  Returns:
    (tokens, lengths, finished, logps), as in a `Generation` but with rubbish
    beyond the end of an answer.
  """
  count = keys.shape[0]
  _, prompts = read_prompts(params, tokens, lengths - 1, config)
  last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
  rows = start_rows(
    config,
    keys=keys,
    sampling=sampling,
    limits=jnp.full(count, max_new_tokens, jnp.int32),
    fed=jnp.repeat(last, count // lengths.shape[0]),
    slots=max_new_tokens,
  )
  rows = grow(
    params,
    (prompts,),
    (Text(tokens, lengths),),
    rows,
    config,
    eos_ids=eos_ids,
  )
  return rows.tokens, rows.lengths, rows.finished, rows.logps
