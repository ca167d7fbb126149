"""Search guided by the value network (arXiv 2412.16145, section 5.4).

Step beam search: B partial answers a question, each proposes B next steps
sampled until a step delimiter; the B candidates of highest V go on. The whole
search is one jitted loop; the caches of policy and value network advance
together.

V was trained at the states before each token, so never at the end-of-sequence
token itself: a finished answer is read at the state before it, an unfinished
one at its last token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.generate import (
  Branches,
  Generation,
  Prefix,
  extend,
  pad_prompts,
  prefill,
  read_prompts,
)
from oreo_jax.decode.sampling import ANCESTRAL, Sampler
from oreo_jax.decode.stops import Stops
from oreo_jax.hosts import to_host
from oreo_jax.models import Cache, Params


class Found(NamedTuple):
  """The best answer so far of each of Q questions, and what it took."""

  tokens: jax.Array  # i32[Q, S], prompt and answer
  lengths: jax.Array  # i32[Q]
  logps: jax.Array  # f32[Q, S]
  finished: jax.Array  # bool[Q], it ends with an end-of-sequence
  values: jax.Array  # f32[Q], V of it; -inf while there is none
  proposed: jax.Array  # i32[Q], tokens the policy proposed for it


class _Beams(NamedTuple):
  """State of the search; beams are question-major, Q * B of them."""

  step: jax.Array  # i32[]
  prefix: Prefix  # the partial answers, with the policy's cache
  critic_cache: Cache  # of all their tokens
  values: jax.Array  # f32[Q * B], V at the last token of each
  hashes: jax.Array  # u32[Q * B, 2], of their text
  active: jax.Array  # bool[Q * B]
  found: Found


class Search(NamedTuple):
  """What `step_beam_search` returns, on the host."""

  answers: Generation  # Q rows: the winning answers
  values: np.ndarray  # f32[Q], the value each won by
  proposed: np.ndarray  # i32[Q], tokens the policy proposed


def step_beam_search(
  policy: Params,
  critic: Params,
  prompts: Sequence[Sequence[int]] | np.ndarray,
  key: jax.Array,
  config: ModelConfig,
  *,
  stops: Stops,
  eos_ids: Sequence[int],
  max_new_tokens: int,
  beams: int = 7,
  max_steps: int = 20,
  max_step_tokens: int = 128,
  sampler: Sampler = ANCESTRAL,
  prompt_length: int | None = None,
  critic_config: ModelConfig | None = None,
) -> Search:
  """Searches for the answer of highest value, step by step.

  Of the B * B candidates of a question, identical ones count once and the B of
  highest V are kept. A kept candidate that ended with an end-of-sequence
  leaves the beam as a finished answer. The finished answer of highest V wins;
  without one, the unfinished answer of highest V.

  Args:
    policy: proposes steps.
    critic: a value network, `init(..., head="value")`.
    prompts: token ids of each question, ragged.
    key: a `jax.random.key`.
    config: architecture of the policy.
    stops: where a step ends, of `make_stops`.
    eos_ids: tokens that end an answer.
    max_new_tokens: most tokens of an answer.
    beams: B; with 1 and temperature 0 the search is greedy decoding.
    max_steps: steps after which the search stops.
    max_step_tokens: a longer step is cut there and competes as it is.
    sampler: how proposals are drawn.
    prompt_length: room for the prompt; fix it over calls to compile once.
    critic_config: architecture of the critic when it is another one.

  Returns:
    A Search with one answer a question.

  Source: arXiv 2412.16145, section 5.4. That identical candidates count once
  is ours: without it a beam of short steps fills with copies of one answer.
  """
  if beams < 1:
    raise ValueError(f"beams: expected at least 1, got {beams}")
  tokens, lengths = pad_prompts(prompts, prompt_length)
  found = _search(
    policy,
    critic,
    tokens,
    lengths,
    key,
    stops,
    config=config,
    critic_config=critic_config or config,
    eos_ids=tuple(eos_ids),
    max_new_tokens=max_new_tokens,
    beams=beams,
    max_steps=max_steps,
    max_step_tokens=min(max_step_tokens, max_new_tokens),
    sampler=sampler,
  )
  text, ends, logps, finished, values, proposed = to_host(found)
  place = lengths[:, None] + np.arange(max_new_tokens)[None]
  inside = place < ends[:, None]
  answers = Generation(
    tokens=np.where(inside, np.take_along_axis(text, place, 1), 0),
    lengths=ends - lengths,
    finished=finished,
    logps=np.where(inside, np.take_along_axis(logps, place, 1), 0.0),
  )
  return Search(answers, values, proposed)


def _search_impl(
  policy,
  critic,
  prompts,
  lengths,
  key,
  stops,
  *,
  config,
  critic_config,
  eos_ids,
  max_new_tokens,
  beams,
  max_steps,
  max_step_tokens,
  sampler,
) -> Found:
  questions = prompts.shape[0]
  count = questions * beams
  limits = jnp.repeat(lengths + max_new_tokens, beams)
  prefix = read_prompts(policy, prompts, lengths, config, room=max_new_tokens)
  slots = prefix.tokens.shape[1]
  scored = prefill(critic, prompts, lengths, critic_config, slots)
  last = scored.hidden[jnp.arange(questions), lengths - 1]
  copies = jnp.repeat(jnp.arange(questions), beams)
  start = _Beams(
    step=jnp.zeros((), jnp.int32),
    prefix=_take_prefix(prefix, copies),
    critic_cache=_take_cache(scored.cache, copies),
    values=models.values(critic, last)[copies],
    hashes=jnp.zeros((count, 2), jnp.uint32),
    active=jnp.ones(count, bool),
    found=Found(
      tokens=prefix.tokens,
      lengths=lengths,
      logps=prefix.logps,
      finished=jnp.zeros(questions, bool),
      values=jnp.full(questions, -jnp.inf, jnp.float32),
      proposed=jnp.zeros(questions, jnp.int32),
    ),
  )

  def unfinished(state: _Beams):
    return (state.step < max_steps) & jnp.any(state.active)

  def advance(state: _Beams) -> _Beams:
    # 1. Every active beam proposes B next steps.
    before = state.prefix.lengths
    room = jnp.where(state.active, limits - before, 0)
    grown = extend(
      policy,
      state.prefix,
      jax.random.fold_in(key, state.step),
      config,
      branches=beams,
      sampler=sampler,
      eos_ids=eos_ids,
      max_new_tokens=max_step_tokens,
      limits=room,
      stops=stops,
    )
    # 2. The value network reads the new tokens.
    parents = jnp.repeat(jnp.arange(count), beams)
    empty = models.init_cache(critic_config, count * beams, max_step_tokens)
    read = models.apply_branches(
      critic,
      grown.tokens,
      critic_config,
      prefix=state.critic_cache,
      prefix_lengths=before,
      local=empty,
      slot=0,
    )
    values = _values_at_end(
      models.values(critic, read.hidden), state.values[parents], grown
    )
    # 3. The B best candidates of each question stay; equal ones count once.
    hashes = _extend_hashes(state.hashes[parents], grown)
    alive = state.active[parents]
    valid = alive & ~_repeated(hashes, alive, questions)
    scores = jnp.where(valid, values, -jnp.inf)
    kept = jax.lax.top_k(scores.reshape(questions, -1), beams)[1]
    kept += jnp.arange(questions, dtype=kept.dtype)[:, None] * beams**2
    kept = kept.reshape(-1)
    prefix = _commit(state.prefix, grown, parents[kept], kept)
    critic_cache = _write_cache(
      _take_cache(state.critic_cache, parents[kept]),
      _take_cache(read.cache, kept),
      before[parents[kept]],
      grown.lengths[kept],
    )
    values, valid = values[kept], valid[kept]
    finished = grown.finished[kept] & valid
    # 4. Those that ended, or have no room left, leave the beam.
    full = prefix.lengths >= limits
    proposed = jnp.sum(grown.lengths.reshape(questions, -1), axis=1)
    found = _keep_best(
      state.found, prefix, values, valid & (finished | full), finished
    )
    return _Beams(
      step=state.step + 1,
      prefix=prefix,
      critic_cache=critic_cache,
      values=values,
      hashes=hashes[kept],
      active=valid & ~finished & ~full,
      found=found._replace(proposed=found.proposed + proposed),
    )

  end = jax.lax.while_loop(unfinished, advance, start)
  cut_off = jnp.zeros_like(end.active)
  return _keep_best(end.found, end.prefix, end.values, end.active, cut_off)


_search = jax.jit(
  _search_impl,
  static_argnames=(
    "config",
    "critic_config",
    "eos_ids",
    "max_new_tokens",
    "beams",
    "max_steps",
    "max_step_tokens",
    "sampler",
  ),
)


def _values_at_end(
  along: jax.Array, before: jax.Array, grown: Branches
) -> jax.Array:
  """Reads V of each candidate.

  At its last token, or at the token before the end-of-sequence, which may be
  the one the step started from.

  Args:
    along: f32[R, M], V at each new token.
    before: f32[R], V where the step started.
    grown: the candidates.

  Returns:
    f32[R].
  """
  along = jnp.concatenate([before[:, None], along], axis=1)
  place = grown.lengths - grown.finished.astype(jnp.int32)
  return jnp.take_along_axis(along, place[:, None], axis=1)[:, 0]


# Bases of two polynomial hashes modulo 2^32.
_BASES = (0x9E3779B1, 0x85EBCA77)


def _extend_hashes(hashes: jax.Array, grown: Branches) -> jax.Array:
  """Returns u32[R, 2]: the hashes of texts longer by the new tokens."""
  bases = jnp.asarray(_BASES, jnp.uint32)

  def append(hashes, column):
    token, inside = column
    longer = hashes * bases + (token + 1).astype(jnp.uint32)[:, None]
    return jnp.where(inside[:, None], longer, hashes), None

  width = grown.tokens.shape[1]
  inside = jnp.arange(width)[:, None] < grown.lengths[None]
  return jax.lax.scan(append, hashes, (grown.tokens.T, inside))[0]


def _repeated(hashes: jax.Array, alive: jax.Array, questions: int) -> jax.Array:
  """Marks candidates whose text an earlier live one of the question has."""
  hashes = hashes.reshape(questions, -1, 2)
  same = jnp.all(hashes[:, :, None] == hashes[:, None, :], axis=-1)
  count = same.shape[-1]
  earlier = jnp.tril(jnp.ones((count, count), bool), -1)
  alive = alive.reshape(questions, 1, -1)
  return jnp.any(same & earlier & alive, axis=2).reshape(-1)


def _take_prefix(prefix: Prefix, index: jax.Array) -> Prefix:
  rows = (jnp.take(x, index, axis=0) for x in prefix[:-1])
  return Prefix(*rows, cache=_take_cache(prefix.cache, index))


def _take_cache(cache: Cache, index: jax.Array) -> Cache:
  return Cache(*(jnp.take(x, index, axis=1) for x in cache))


def _commit(
  prefix: Prefix, grown: Branches, parents: jax.Array, kept: jax.Array
) -> Prefix:
  """Returns the kept branches as prefixes, behind their parents' tokens."""
  old = _take_prefix(prefix, parents)
  count = grown.lengths[kept]
  return Prefix(
    tokens=_write(old.tokens, grown.tokens[kept], old.lengths, count),
    lengths=old.lengths + count,
    logps=_write(old.logps, grown.logps[kept], old.lengths, count),
    stop_state=grown.stop_state[kept],
    # The branch's slot 0 is the prefix's last token.
    cache=_write_cache(
      old.cache, _take_cache(grown.cache, kept), old.lengths - 1, count
    ),
  )


def _write_cache(old: Cache, new: Cache, start, count) -> Cache:
  write = jax.vmap(_write, in_axes=(0, 0, None, None))
  return Cache(
    *(write(x, y, start, count) for x, y in zip(old, new, strict=True))
  )


def _write(old: jax.Array, new: jax.Array, start, count) -> jax.Array:
  """Writes the first `count` of new [P, M, ...] into old [P, S, ...]."""
  offsets = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
  inside = offsets < count[:, None]
  place = jnp.where(inside, start[:, None] + offsets, old.shape[1])
  rows = jnp.arange(old.shape[0])[:, None]
  return old.at[rows, place].set(new.astype(old.dtype), mode="drop")


def _keep_best(found: Found, beams: Prefix, values, leaving, finished) -> Found:
  """Puts the best leaving beam of each question in place of a worse one."""
  questions = found.values.shape[0]
  width = beams.lengths.shape[0] // questions
  # A finished answer beats every unfinished one; values decide within each.
  rank = (leaving & finished).reshape(questions, width)
  new_finished = jnp.any(rank, axis=1)
  eligible = leaving.reshape(rank.shape) & (rank == new_finished[:, None])
  scores = jnp.where(eligible, values.reshape(rank.shape), -jnp.inf)
  winner = jnp.argmax(scores, axis=1)
  score = jnp.max(scores, axis=1)
  better = jnp.where(
    new_finished == found.finished, score > found.values, new_finished
  )
  better &= score > -jnp.inf
  index = jnp.arange(questions) * width + winner

  def pick(new, old):
    new = jnp.take(new, index, axis=0)
    return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

  return Found(
    tokens=pick(beams.tokens, found.tokens),
    lengths=pick(beams.lengths, found.lengths),
    logps=pick(beams.logps, found.logps),
    finished=jnp.where(better, new_finished, found.finished),
    values=jnp.where(better, score, found.values),
    proposed=found.proposed,
  )
