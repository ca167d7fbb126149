"""Generation: a prefill, then one jitted loop over the KV cache.

Prompts of different lengths are left-aligned: token i of a row is at position i
and in cache slot i. What grows from them, samples of a prompt or proposals of a
beam, shares the cache of its prefix and keeps its own tokens in a small one, so
that a step writes one slot and the long part is read once for all branches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.sampling import ANCESTRAL, Sampler, draw
from oreo_jax.decode.stops import Stops
from oreo_jax.decode.stops import advance as read_stops
from oreo_jax.hosts import to_host
from oreo_jax.models import Cache, Params
from oreo_jax.sharding import constrain_batch


class Prefix(NamedTuple):
  """What P rows hold so far, left-aligned: prompts, or beams of a search."""

  tokens: jax.Array  # i32[P, S]; rubbish beyond `lengths`
  lengths: jax.Array  # i32[P]
  logps: jax.Array  # f32[P, S], log pi of each generated token, 0 elsewhere
  stop_state: jax.Array  # i32[P], of the automaton of the stops
  # Keys and values of all tokens but the last one, which is fed next.
  cache: Cache


class Branches(NamedTuple):
  """R = P * branches continuations, those of a prefix side by side."""

  tokens: jax.Array  # i32[R, M], new tokens; rubbish beyond `lengths`
  lengths: jax.Array  # i32[R], new tokens
  finished: jax.Array  # bool[R], the last one is an end-of-sequence
  logps: jax.Array  # f32[R, M], log pi of each new token
  stop_state: jax.Array  # i32[R], of the automaton after the last one
  cache: Cache  # slot 0: the prefix's last token; slot j + 1: new token j


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


def pad_prompts(
  prompts: Sequence[Sequence[int]], length: int | None = None
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


def prefill(
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  config: ModelConfig,
  slots: int,
) -> models.Output:
  """Writes the first `lengths` tokens of each prompt into a fresh cache.

  Args:
    params: of a policy or a value network.
    prompts: i32[P, W].
    lengths: i32[P], tokens of each row that are written.
    config: the architecture.
    slots: S of the cache.

  Returns:
    Output(hidden [P, W, D], cache).
  """
  index = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None]
  positions = jnp.where(index < lengths[:, None], index, -1)
  cache = models.init_cache(config, prompts.shape[0], slots)
  cache = models.Cache(*(constrain_batch(x, dim=1) for x in cache))
  return models.apply(params, prompts, config, positions=positions, cache=cache)


def read_prompts(
  params: Params,
  prompts: jax.Array,
  lengths: jax.Array,
  config: ModelConfig,
  *,
  room: int = 0,
) -> Prefix:
  """Prefills prompts [P, W] into rows with room for `room` more tokens."""
  prompts, lengths = constrain_batch(prompts), constrain_batch(lengths)
  # The last token is left to the first decoding step, so that every step, the
  # first included, feeds one token and reads one distribution.
  slots = prompts.shape[1] + room
  cache = prefill(params, prompts, lengths - 1, config, slots).cache
  return Prefix(
    tokens=jnp.pad(prompts, ((0, 0), (0, room))),
    lengths=lengths,
    logps=jnp.zeros((prompts.shape[0], slots), jnp.float32),
    stop_state=jnp.zeros_like(lengths),
    cache=cache,
  )


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
    key: of the draws; each step has its own stream, so a row's draws do not
      depend on how long other rows are.
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

  def unfinished(carry):
    step, active = carry[:2]
    return (step < max_new_tokens) & jnp.any(active)

  def body(carry):
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
    token, logp = draw(jax.random.fold_in(key, step), logits, sampler)
    ended = jnp.any(token[:, None] == eos, axis=1)
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
      stop_state=stop_state,
      cache=out.cache,
    )
    active &= ~ended & ~stopped & (lengths < limit)
    return step + 1, active, token[:, None], grown

  start = Branches(
    tokens=jnp.zeros((rows, max_new_tokens), jnp.int32),
    lengths=jnp.zeros(rows, jnp.int32),
    finished=jnp.zeros(rows, bool),
    logps=jnp.zeros((rows, max_new_tokens), jnp.float32),
    stop_state=jnp.repeat(prefix.stop_state, branches),
    cache=models.Cache(*(constrain_batch(x, dim=1) for x in empty)),
  )
  carry = (
    jnp.zeros((), jnp.int32),
    limit > 0,
    jnp.repeat(last, branches, axis=0),
    start,
  )
  return jax.lax.while_loop(unfinished, body, carry)[3]


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
  prompts: Sequence[Sequence[int]] | np.ndarray,
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
