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
from oreo_jax.decode.grow import Rows, Text, grow, start_rows
from oreo_jax.decode.prompts import read_prompts
from oreo_jax.decode.sampling import Sampling, row_keys
from oreo_jax.decode.scores import Candidates, Score
from oreo_jax.decode.stops import Stops
from oreo_jax.decode.suffixes import append, pick, pick_rows
from oreo_jax.models import Cache, Params, Shared

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
  sampling: Sampling  # scalars: how every proposal is drawn
  config: ModelConfig = _static()
  critic_config: ModelConfig = _static()
  beams: int = _static()
  max_steps: int = _static()
  max_step_tokens: int = _static()
  max_new_tokens: int = _static()
  eos_ids: tuple[int, ...] = _static()
  score: Score = _static()
  granularity: str = _static()


class Winners(NamedTuple):
  """The best answer so far of each of Q questions."""

  tokens: jax.Array  # i32[Q, A]; rubbish beyond `lengths`
  lengths: jax.Array  # i32[Q]
  logps: jax.Array  # f32[Q, A]
  finished: jax.Array  # bool[Q], it ends with an end-of-sequence
  values: jax.Array  # f32[Q], V of it
  scores: jax.Array  # f32[Q], what it is ranked by; -inf while there is none


class Beams(NamedTuple):
  """State of the search: B partial answers a question, question-major."""

  step: jax.Array  # i32[]
  problems: jax.Array  # i32[Q], the number of each question
  prompts: Text  # Q of them
  prompt_cache: Shared  # the policy's, of all but the last token of a prompt
  tokens: jax.Array  # i32[Q * B, A], answers so far; rubbish beyond `lengths`
  lengths: jax.Array  # i32[Q * B]
  logps: jax.Array  # f32[Q * B, A], log pi of each token
  fed: jax.Array  # i32[Q * B], the last token, the prompt's at first
  stop_state: jax.Array  # i32[Q * B], where the automaton of the stops is
  # The policy's, of the prompt's last token and of the answer without its last
  # one, which is fed next: as many slots as `lengths` says.
  cache: Cache
  critic_prompts: Shared | None  # of whole prompts
  critic_cache: Cache | None  # of all tokens of the answer
  values: jax.Array  # f32[Q * B], V of each where it was trained
  last_values: jax.Array  # f32[Q * B], V at the last token of each
  scores: jax.Array  # f32[Q * B], what each was ranked by
  hashes: jax.Array  # u32[Q * B, 2], of the tokens of each answer
  active: jax.Array  # bool[Q * B]; others have left and only fill the shape
  winners: Winners
  proposed: jax.Array  # i32[Q], tokens the policy proposed so far


def start_beams(
  plan: Plan, prompts: jax.Array, lengths: jax.Array, problems: jax.Array
) -> Beams:
  """Reads the prompts; every beam of a question has an empty answer at first.

  Args:
    plan: of the search.
    prompts: i32[Q, W].
    lengths: i32[Q], tokens of each prompt.
    problems: i32[Q], the number of each question.
  """
  questions = prompts.shape[0]
  count = questions * plan.beams
  _, prompt_cache = read_prompts(plan.policy, prompts, lengths - 1, plan.config)
  values = jnp.full(questions, jnp.nan, jnp.float32)
  critic_prompts = critic_cache = None
  if plan.critic is not None:
    hidden, critic_prompts = read_prompts(
      plan.critic, prompts, lengths, plan.critic_config
    )
    last = hidden[jnp.arange(questions), lengths - 1]
    values = models.values(plan.critic, last)
    critic_cache = _empty_cache(plan.critic_config, count, plan.max_new_tokens)
  first_values = jnp.repeat(values, plan.beams)
  nothing = Candidates(
    values=first_values,
    logps=jnp.zeros(count, jnp.float32),
    lengths=jnp.zeros(count, jnp.int32),
    finished=jnp.zeros(count, bool),
  )
  last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
  return Beams(
    step=jnp.zeros((), jnp.int32),
    problems=problems,
    prompts=Text(prompts, lengths),
    prompt_cache=prompt_cache,
    tokens=jnp.zeros((count, plan.max_new_tokens), jnp.int32),
    lengths=nothing.lengths,
    logps=jnp.zeros((count, plan.max_new_tokens), jnp.float32),
    fed=jnp.repeat(last, plan.beams),
    stop_state=jnp.zeros(count, jnp.int32),
    cache=_empty_cache(plan.config, count, plan.max_new_tokens),
    critic_prompts=critic_prompts,
    critic_cache=critic_cache,
    values=first_values,
    last_values=first_values,
    scores=plan.score(nothing),
    hashes=jnp.zeros((count, 2), jnp.uint32),
    active=jnp.ones(count, bool),
    winners=Winners(
      tokens=jnp.zeros((questions, plan.max_new_tokens), jnp.int32),
      lengths=jnp.zeros(questions, jnp.int32),
      logps=jnp.zeros((questions, plan.max_new_tokens), jnp.float32),
      finished=jnp.zeros(questions, bool),
      values=values,
      scores=jnp.full(questions, -jnp.inf, jnp.float32),
    ),
    proposed=jnp.zeros(questions, jnp.int32),
  )


def _empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
  return models.init_cache(config, rows, slots)


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

  # 1. Propose. Every active beam grows B branches to the end of their step, of
  # the answer, or of the room.
  grown = _propose(state, plan)

  # 2. Judge. The value network reads all new tokens of a candidate in one go,
  # behind the cache of its parent, and the score ranks what it says.
  values, last_values, critic_cache = _read_values(state, grown, parents, plan)
  inside = jnp.arange(plan.max_step_tokens)[None] < grown.lengths[:, None]
  new_logps = jnp.sum(jnp.where(inside, grown.logps, 0.0), axis=1)
  scores = plan.score(
    Candidates(
      values=values,
      logps=_sum_logps(state)[parents] + new_logps,
      lengths=state.lengths[parents] + grown.lengths,
      finished=grown.finished,
    )
  )

  # 3. Choose. Of candidates that say the same the first one stands for all.
  # `top_k` always returns B of them: where there are fewer real candidates it
  # takes others too, and `valid` remembers which are real.
  hashes = extend_hashes(state.hashes[parents], grown.tokens, grown.lengths)
  alive = state.active[parents]
  valid = alive & ~is_repeated(hashes, alive, questions) & (scores > -jnp.inf)
  scores = jnp.where(valid, scores, -jnp.inf)
  # i32[Q, B], counted within each question, as rows of one question never meet
  # those of another.
  chosen = jax.lax.top_k(scores.reshape(questions, -1), beams)[1]
  kept_beams = chosen // beams
  values, scores, valid, last_values, hashes, finished, lengths = pick_rows(
    (
      values,
      scores,
      valid,
      last_values,
      hashes,
      grown.finished,
      grown.lengths,
    ),
    chosen,
  )

  # 4. Write. The chosen candidates become the beams: what a beam has generated
  # is copied from the parent, the new tokens go behind. Prompts stay where they
  # are. The value network has read a beam's last token, the policy has not but
  # has read one more before (see `Beams`), so both caches are equally long.
  before = pick(state.lengths, kept_beams)
  tokens, logps = (
    append(pick(old, kept_beams), pick(new, chosen), before)
    for old, new in ((state.tokens, grown.tokens), (state.logps, grown.logps))
  )
  cache = _append_cache(state.cache, grown.cache, kept_beams, chosen, before)
  if state.critic_cache is not None and critic_cache is not None:
    critic_cache = _append_cache(
      state.critic_cache, critic_cache, kept_beams, chosen, before
    )
  answered = before + lengths

  # 5. Leave. An answer that ended, or has no room left, leaves its beam and is
  # remembered if it is the best so far.
  finished &= valid
  full = valid & (answered >= plan.max_new_tokens)
  end = state._replace(
    step=state.step + 1,
    tokens=tokens,
    lengths=answered,
    logps=logps,
    fed=pick(grown.fed, chosen),
    stop_state=pick(grown.stop_state, chosen),
    cache=cache,
    critic_cache=critic_cache,
    values=values,
    last_values=last_values,
    scores=scores,
    hashes=hashes,
    active=valid & ~finished & ~full,
    proposed=state.proposed
    + jnp.sum(grown.lengths.reshape(questions, -1), axis=1),
  )
  winners = keep_best(end, leaving=finished | full, finished=finished)
  return end._replace(winners=winners)


def _propose(state: Beams, plan: Plan) -> Rows:
  """Grows B branches from every active beam."""
  beams, rows = plan.beams, state.fed.shape[0]
  count = rows * beams
  # The key of a proposal does not depend on what other questions there are,
  # nor on how many tokens earlier steps took.
  candidate = jnp.arange(count, dtype=jnp.int32) % beams**2
  keys = row_keys(
    plan.key,
    jnp.repeat(state.problems, beams**2),
    state.step * beams**2 + candidate,
  )
  limits = jnp.where(state.active, plan.max_new_tokens - state.lengths, 0)
  grown = start_rows(
    plan.config,
    keys=keys,
    sampling=Sampling(*(jnp.broadcast_to(x, count) for x in plan.sampling)),
    limits=jnp.repeat(limits, beams),
    fed=jnp.repeat(state.fed, beams),
    stop_state=jnp.repeat(state.stop_state, beams),
    slots=plan.max_step_tokens,
  )
  return grow(
    plan.policy,
    (state.prompt_cache, Shared(state.cache, state.lengths)),
    (state.prompts, Text(state.tokens, state.lengths)),
    grown,
    plan.config,
    eos_ids=plan.eos_ids,
    stops=plan.stops,
  )


def _append_cache(
  old: Cache,
  new: Cache,
  parents: jax.Array,
  chosen: jax.Array,
  before: jax.Array,
) -> Cache:
  """Returns the parents' caches, the chosen ones' new slots behind them."""
  return Cache(
    *(
      append(pick(x, parents, axis=1), pick(y, chosen, axis=1), before, axis=3)
      for x, y in zip(old, new, strict=True)
    )
  )


def _sum_logps(state: Beams) -> jax.Array:
  inside = jnp.arange(state.logps.shape[1])[None] < state.lengths[:, None]
  return jnp.sum(jnp.where(inside, state.logps, 0.0), axis=1)


def _read_values(
  state: Beams, grown: Rows, parents: jax.Array, plan: Plan
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
  if (
    plan.critic is None
    or state.critic_cache is None
    or state.critic_prompts is None
  ):
    return state.values[parents], state.last_values[parents], None
  read = models.apply_branches(
    plan.critic,
    grown.tokens,
    plan.critic_config,
    shared=(state.critic_prompts, Shared(state.critic_cache, state.lengths)),
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
  state: Beams, *, leaving: jax.Array, finished: jax.Array
) -> Winners:
  """Returns the winners after some beams have left.

  The best leaving beam of each question takes the place of a worse winner.
  Answers are compared by (finished, score): one that ended with an
  end-of-sequence beats every one that was cut off, whatever their scores, and
  among equals the score decides. The earlier one stays at a tie.

  Args:
    state: its beams, and its winners so far.
    leaving: bool[Q * B]; the others do not compete.
    finished: bool[Q * B].
  """
  winners = state.winners
  questions = winners.scores.shape[0]
  leaving, finished, scores = (
    x.reshape(questions, -1) for x in (leaving, finished, state.scores)
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

  def choose(new: jax.Array, old: jax.Array) -> jax.Array:
    new = pick(new, best[:, None])
    return jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

  return Winners(
    tokens=choose(state.tokens, winners.tokens),
    lengths=choose(state.lengths, winners.lengths),
    logps=choose(state.logps, winners.logps),
    finished=jnp.where(better, any_finished, winners.finished),
    values=choose(state.values, winners.values),
    scores=jnp.where(better, score, winners.scores),
  )
