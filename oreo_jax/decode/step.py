"""One step of a search: its plan, its state, and `advance` to the next one."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.duplicates import extend_hashes, is_repeated
from oreo_jax.decode.generate import extend
from oreo_jax.decode.prefix import (
  Branches,
  Prefix,
  append_branches,
  append_cache,
  prefill,
  read_prompts,
  take_cache,
  take_prefix,
)
from oreo_jax.decode.sampling import Sampler
from oreo_jax.decode.scores import Candidates, Score
from oreo_jax.decode.stops import Stops
from oreo_jax.models import Cache, Params

_static = functools.partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """What stays the same from step to step; see `step_beam_search`.

  Arrays are traced; the settings are static, and other ones compile anew.
  """

  policy: Params
  critic: Params | None
  stops: Stops
  key: jax.Array
  config: ModelConfig = _static()
  critic_config: ModelConfig = _static()
  beams: int = _static()
  max_steps: int = _static()
  max_step_tokens: int = _static()
  max_new_tokens: int = _static()
  eos_ids: tuple[int, ...] = _static()
  sampler: Sampler = _static()
  score: Score = _static()
  granularity: str = _static()


class Winners(NamedTuple):
  """The best answer so far of each of Q questions."""

  tokens: jax.Array  # i32[Q, S], prompt and answer
  lengths: jax.Array  # i32[Q]
  logps: jax.Array  # f32[Q, S]
  finished: jax.Array  # bool[Q], it ends with an end-of-sequence
  values: jax.Array  # f32[Q], V of it
  scores: jax.Array  # f32[Q], what it is ranked by; -inf while there is none


class Beams(NamedTuple):
  """State of the search: B partial answers a question, question-major."""

  step: jax.Array  # i32[]
  prefix: Prefix  # Q * B partial answers, with the policy's cache
  limits: jax.Array  # i32[Q * B], most tokens of each, the prompt included
  critic_cache: Cache | None  # of all their tokens
  values: jax.Array  # f32[Q * B], V of each where it was trained
  last_values: jax.Array  # f32[Q * B], V at the last token of each
  scores: jax.Array  # f32[Q * B], what each was ranked by
  hashes: jax.Array  # u32[Q * B, 2], of the tokens of each answer
  active: jax.Array  # bool[Q * B]; others have left and only fill the shape
  winners: Winners
  proposed: jax.Array  # i32[Q], tokens the policy proposed so far


def start_beams(plan: Plan, prompts: jax.Array, lengths: jax.Array) -> Beams:
  """Reads the prompts; every beam of a question is the bare prompt at first.

  Args:
    plan: of the search.
    prompts: i32[Q, W].
    lengths: i32[Q], tokens of each prompt.
  """
  questions = prompts.shape[0]
  count = questions * plan.beams
  copies = jnp.repeat(jnp.arange(questions), plan.beams)
  prefix = read_prompts(
    plan.policy, prompts, lengths, plan.config, room=plan.max_new_tokens
  )
  values, critic_cache = jnp.full(questions, jnp.nan, jnp.float32), None
  if plan.critic is not None:
    slots = prefix.tokens.shape[1]
    hidden, cache = prefill(
      plan.critic, prompts, lengths, plan.critic_config, slots
    )
    last = hidden[jnp.arange(questions), lengths - 1]
    values = models.values(plan.critic, last)
    critic_cache = take_cache(cache, copies)
  nothing = Candidates(
    values=values[copies],
    logps=jnp.zeros(count, jnp.float32),
    lengths=jnp.zeros(count, jnp.int32),
    finished=jnp.zeros(count, bool),
  )
  return Beams(
    step=jnp.zeros((), jnp.int32),
    prefix=take_prefix(prefix, copies),
    limits=jnp.repeat(lengths + plan.max_new_tokens, plan.beams),
    critic_cache=critic_cache,
    values=nothing.values,
    last_values=nothing.values,
    scores=plan.score(nothing),
    hashes=jnp.zeros((count, 2), jnp.uint32),
    active=jnp.ones(count, bool),
    winners=Winners(
      tokens=prefix.tokens,
      lengths=lengths,
      logps=prefix.logps,
      finished=jnp.zeros(questions, bool),
      values=values,
      scores=jnp.full(questions, -jnp.inf, jnp.float32),
    ),
    proposed=jnp.zeros(questions, jnp.int32),
  )


def advance(state: Beams, plan: Plan) -> Beams:
  """Takes one step of the search: propose, judge, choose, write, leave.

  Shapes never change. With Q questions and B beams a question, rows are either
  *beams* (Q * B) or *candidates* (Q * B * B): candidates i * B to i * B + B - 1
  are what beam i proposed, so `parents[c] = c // B` is the beam that candidate
  c continues, and each question owns B * B candidates in a row. A beam that
  has left stays as a row that is not active: it proposes nothing, and its
  candidates are never chosen over a real one.

  Args:
    state: before the step.
    plan: of the search.

  Returns:
    The state after the step.
  """
  questions, beams = state.proposed.shape[0], plan.beams
  parents = jnp.repeat(jnp.arange(questions * beams), beams)
  before = state.prefix.lengths

  # 1. Propose. Every active beam grows B branches to the end of their step, of
  # the answer, or of the room. The key of a step does not depend on how many
  # tokens earlier steps took.
  grown = extend(
    plan.policy,
    state.prefix,
    jax.random.fold_in(plan.key, state.step),
    plan.config,
    branches=beams,
    sampler=plan.sampler,
    eos_ids=plan.eos_ids,
    max_new_tokens=plan.max_step_tokens,
    limits=jnp.where(state.active, state.limits - before, 0),
    stops=plan.stops,
  )

  # 2. Judge. The value network reads all new tokens of a candidate in one go,
  # behind the cache of its parent, and the score ranks what it says.
  values, last_values, critic_branches = _read_values(
    state, grown, parents, plan
  )
  inside = jnp.arange(plan.max_step_tokens)[None] < grown.lengths[:, None]
  new_logps = jnp.sum(jnp.where(inside, grown.logps, 0.0), axis=1)
  answered = before - (state.limits - plan.max_new_tokens)
  scores = plan.score(
    Candidates(
      values=values,
      logps=jnp.sum(state.prefix.logps, axis=1)[parents] + new_logps,
      lengths=answered[parents] + grown.lengths,
      finished=grown.finished,
    )
  )

  # 3. Choose. Of candidates that say the same the first one stands for all.
  # `top_k` counts within each question, so its indices are moved on to where
  # the question begins. It always returns B of them: where there are fewer real
  # candidates it takes others too, and `valid` remembers which are real.
  hashes = extend_hashes(state.hashes[parents], grown.tokens, grown.lengths)
  alive = state.active[parents]
  valid = alive & ~is_repeated(hashes, alive, questions) & (scores > -jnp.inf)
  scores = jnp.where(valid, scores, -jnp.inf)
  chosen = jax.lax.top_k(scores.reshape(questions, -1), beams)[1]
  first = jnp.arange(questions, dtype=chosen.dtype)[:, None] * beams**2
  chosen = (first + chosen).reshape(-1)
  parents = parents[chosen]
  values, scores, valid = values[chosen], scores[chosen], valid[chosen]

  # 4. Write. The chosen candidates become the beams: text and caches of the
  # parent are copied, the new tokens go behind them. The value network has read
  # a beam's last token, the policy's cache has not (see `Prefix`), so the two
  # caches are written from different slots.
  prefix = append_branches(state.prefix, grown, parents, chosen)
  critic_cache = None
  if state.critic_cache is not None and critic_branches is not None:
    critic_cache = append_cache(
      take_cache(state.critic_cache, parents),
      take_cache(critic_branches, chosen),
      before[parents],
      grown.lengths[chosen],
    )

  # 5. Leave. An answer that ended, or has no room left, leaves its beam and is
  # remembered if it is the best so far.
  limits = state.limits[parents]
  finished = grown.finished[chosen] & valid
  full = valid & (prefix.lengths >= limits)
  winners = keep_best(
    state.winners,
    prefix,
    values=values,
    scores=scores,
    leaving=finished | full,
    finished=finished,
  )
  proposed = jnp.sum(grown.lengths.reshape(questions, -1), axis=1)
  return Beams(
    step=state.step + 1,
    prefix=prefix,
    limits=limits,
    critic_cache=critic_cache,
    values=values,
    last_values=last_values[chosen],
    scores=scores,
    hashes=hashes[chosen],
    active=valid & ~finished & ~full,
    winners=winners,
    proposed=state.proposed + proposed,
  )


def _read_values(
  state: Beams, grown: Branches, parents: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array, Cache | None]:
  """Reads V of each candidate where V was trained.

  That is never at the end-of-sequence token itself: a finished answer is read
  at the state before it, which may be the one the step started from. Other
  candidates are read at their last token; but a critic of step level was
  trained between steps alone, so a step that was cut keeps the value of the
  state where it began.

  Returns:
    (f32[R] V to rank by, f32[R] V at the last token, the cache of the new
    tokens).
  """
  if plan.critic is None or state.critic_cache is None:
    return state.values[parents], state.last_values[parents], None
  read = models.apply_branches(
    plan.critic,
    grown.tokens,
    plan.critic_config,
    prefix=state.critic_cache,
    prefix_lengths=state.prefix.lengths,
    local=models.init_cache(
      plan.critic_config, len(parents), plan.max_step_tokens
    ),
    slot=0,
  )
  # Column i is V after i new tokens.
  along = jnp.concatenate(
    [
      state.last_values[parents][:, None],
      models.values(plan.critic, read.hidden),
    ],
    axis=1,
  )

  def read_after(count: jax.Array) -> jax.Array:
    return jnp.take_along_axis(along, count[:, None], axis=1)[:, 0]

  last_values = read_after(grown.lengths)
  values = read_after(grown.lengths - grown.finished.astype(jnp.int32))
  if plan.granularity == "step":
    trained = grown.finished | grown.step_ended
    values = jnp.where(trained, values, state.values[parents])
  return values, last_values, read.cache


def keep_best(
  winners: Winners,
  beams: Prefix,
  *,
  values: jax.Array,
  scores: jax.Array,
  leaving: jax.Array,
  finished: jax.Array,
) -> Winners:
  """Puts the best leaving beam of each question in place of a worse winner.

  Answers are compared by (finished, score): one that ended with an
  end-of-sequence beats every one that was cut off, whatever their scores, and
  among equals the score decides. The earlier one stays at a tie.

  Args:
    winners: so far, of Q questions.
    beams: Q * B texts.
    values: f32[Q * B], V of each.
    scores: f32[Q * B].
    leaving: bool[Q * B]; the others do not compete.
    finished: bool[Q * B].
  """
  questions = winners.scores.shape[0]
  leaving, finished, scores = (
    x.reshape(questions, -1) for x in (leaving, finished, scores)
  )
  finished &= leaving
  # The best beam of each question. If one of them finished, only the finished
  # ones compete; otherwise all that leave do.
  any_finished = jnp.any(finished, axis=1)
  competing = leaving & (finished == any_finished[:, None])
  scores = jnp.where(competing, scores, -jnp.inf)
  best = jnp.argmax(scores, axis=1)
  score = jnp.max(scores, axis=1)
  # Against the winner so far: of two that are alike in having finished the
  # score decides, otherwise the one that finished. A score of -inf says that
  # no beam leaves.
  alike = any_finished == winners.finished
  better = jnp.where(alike, score > winners.scores, any_finished)
  better &= score > -jnp.inf
  rows = jnp.arange(questions) * leaving.shape[1] + best

  def choose(new: jax.Array, old: jax.Array) -> jax.Array:
    new = jnp.take(new, rows, axis=0)
    return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

  return Winners(
    tokens=choose(beams.tokens, winners.tokens),
    lengths=choose(beams.lengths, winners.lengths),
    logps=choose(beams.logps, winners.logps),
    finished=jnp.where(better, any_finished, winners.finished),
    values=choose(values, winners.values),
    scores=jnp.where(better, score, winners.scores),
  )
