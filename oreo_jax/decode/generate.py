"""Generation: a prefill, then one jitted loop over the KV cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.prefix import (
  Branches,
  Prefix,
  Prompts,
  pad_prompts,
  read_prompts,
)
from oreo_jax.decode.sampling import (
  ANCESTRAL,
  Sampler,
  draw,
  row_keys,
  sampling_rows,
)
from oreo_jax.decode.stops import Stops
from oreo_jax.decode.stops import advance as read_stops
from oreo_jax.hosts import to_host
from oreo_jax.models import Cache, Params
from oreo_jax.sharding import constrain_batch


class Generation(NamedTuple):
  """What `generate` returns, on the host."""

  tokens: np.ndarray  # i32[R, max_new_tokens], the answers; 0 beyond the end
  lengths: np.ndarray  # i32[R], tokens of the answer, end-of-sequence included
  finished: np.ndarray  # bool[R]; False: cut off at max_new_tokens
  logps: np.ndarray  # f32[R, max_new_tokens], 0 beyond the end

  def answers(self) -> list[np.ndarray]:
    """Returns the tokens of each answer, without the end-of-sequence."""
    ends = self.lengths - self.finished
    return [row[:end] for row, end in zip(self.tokens, ends, strict=True)]


def extend(
  params: Params,
  prefix: Prefix,
  key: jax.Array,
  config: ModelConfig,
  *,
  branches: int,
  sampler: Sampler,
  eos_ids: tuple[int, ...],
  max_new_tokens: int,
  limits: jax.Array | None = None,
  stops: Stops | None = None,
) -> Branches:
  """Grows branches from every prefix until all end, in one `while_loop`.

  A branch ends after an end-of-sequence token, after the token that ends its
  step, or at its limit. The prefixes' cache is only read, once a token for all
  branches.

  Args:
    params: the policy.
    prefix: P rows.
    key: of the draws; each branch has its own stream.
    config: the policy's architecture.
    branches: continuations of each prefix.
    sampler: how tokens are drawn.
    eos_ids: tokens that end an answer.
    max_new_tokens: M, most tokens of a branch.
    limits: i32[P], most tokens of the branches of each prefix; 0 grows none.
    stops: where a step ends; None: go on to the end.

  Returns:
    The branches.
  """
  rows = prefix.lengths.shape[0] * branches
  eos = jnp.asarray(eos_ids, jnp.int32)
  limit = (
    jnp.full(rows, max_new_tokens, jnp.int32)
    if limits is None
    else jnp.minimum(jnp.repeat(limits, branches), max_new_tokens)
  )
  last = jnp.take_along_axis(prefix.tokens, prefix.lengths[:, None] - 1, axis=1)
  empty = models.init_cache(config, rows, max_new_tokens)
  row = jnp.arange(rows, dtype=jnp.int32)
  keys = row_keys(key, row // branches, row % branches)
  sampling = sampling_rows([sampler] * rows)

  def unfinished(carry: tuple) -> jax.Array:
    step, active = carry[:2]
    return (step < max_new_tokens) & jnp.any(active)

  def add_token(carry: tuple) -> tuple:
    step, active, fed, grown = carry
    out = models.apply_branches(
      params,
      fed,
      config,
      prefix=prefix.cache,
      prefix_lengths=prefix.lengths - 1,
      local=grown.cache,
      slot=step,
    )
    logits = models.logits(params, out.hidden[:, 0], config)
    penalized = sampler.repetition_penalty != 1
    text = _text_so_far(prefix, grown, branches) if penalized else ()
    token, logp = draw(keys, grown.lengths, logits, sampling, *text)
    ended = jnp.any(token[:, None] == eos[None], axis=1)
    stop_state, stopped = grown.stop_state, jnp.zeros_like(ended)
    if stops is not None:
      after, stopped = read_stops(stops, stop_state, token)
      stop_state = jnp.where(active, after, stop_state)
    lengths = grown.lengths + active.astype(jnp.int32)
    grown = Branches(
      tokens=_set_column(grown.tokens, step, token),
      lengths=lengths,
      finished=grown.finished | (active & ended),
      logps=_set_column(grown.logps, step, logp),
      step_ended=grown.step_ended | (active & stopped),
      stop_state=stop_state,
      cache=cast(Cache, out.cache),
    )
    active &= ~ended & ~stopped & (lengths < limit)
    return step + 1, active, token[:, None], grown

  start = Branches(
    tokens=jnp.zeros((rows, max_new_tokens), jnp.int32),
    lengths=jnp.zeros(rows, jnp.int32),
    finished=jnp.zeros(rows, bool),
    logps=jnp.zeros((rows, max_new_tokens), jnp.float32),
    step_ended=jnp.zeros(rows, bool),
    stop_state=jnp.repeat(prefix.stop_state, branches),
    cache=models.Cache(*(constrain_batch(x, dim=1) for x in empty)),
  )
  carry = (
    jnp.zeros((), jnp.int32),
    limit > 0,
    jnp.repeat(last, branches, axis=0),
    start,
  )
  return jax.lax.while_loop(unfinished, add_token, carry)[3]


def _text_so_far(
  prefix: Prefix, grown: Branches, branches: int
) -> tuple[jax.Array, jax.Array]:
  """Returns all tokens of each branch, i32[R, S + M], and which are some."""

  def inside(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return index[None] < lengths[:, None]

  repeat = functools.partial(jnp.repeat, repeats=branches, axis=0)
  before = inside(prefix.tokens, prefix.lengths)
  after = inside(grown.tokens, grown.lengths)
  return (
    jnp.concatenate([repeat(prefix.tokens), grown.tokens], axis=1),
    jnp.concatenate([repeat(before), after], axis=1),
  )


def _set_column(x: jax.Array, column: jax.Array, new: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(x, new[:, None], column, axis=1)


_read = jax.jit(read_prompts, static_argnames=("config", "room"))
_extend = jax.jit(
  extend,
  static_argnames=(
    "config",
    "branches",
    "sampler",
    "eos_ids",
    "max_new_tokens",
  ),
)


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
) -> Generation:
  """Continues prompts.

  Args:
    params: the policy.
    prompts: token ids of each prompt, ragged.
    key: a `jax.random.key`.
    config: the policy's architecture.
    max_new_tokens: most tokens of an answer, end-of-sequence included.
    eos_ids: tokens that end an answer.
    sampler: how tokens are drawn; temperature 0 is greedy.
    num_samples: answers a prompt; the prompt is prefilled once.
    prompt_length: room for the prompt; fix it over calls to compile once.

  Returns:
    A Generation of len(prompts) * num_samples rows, the samples of one prompt
    side by side.
  """
  tokens, lengths = pad_prompts(prompts, prompt_length)
  grown = _extend(
    params,
    _read(params, tokens, lengths, config),
    key,
    config,
    branches=num_samples,
    sampler=sampler,
    eos_ids=tuple(eos_ids),
    max_new_tokens=max_new_tokens,
  )
  tokens, lengths, finished, logps = to_host(grown[:4])
  inside = np.arange(max_new_tokens)[None] < lengths[:, None]
  return Generation(
    tokens=np.where(inside, tokens, 0),
    lengths=lengths,
    finished=finished,
    logps=np.where(inside, logps, 0.0),
  )
