"""One step of a search: its state, and `advance` to the next one."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from oreo_jax.decode.branches import (
  Reading,
  Stems,
  candidates_of,
  judge,
  propose,
)
from oreo_jax.decode.duplicates import extend_hashes, is_repeated
from oreo_jax.decode.grow import Text
from oreo_jax.decode.lookahead import look_ahead
from oreo_jax.decode.plan import Plan
from oreo_jax.decode.sampling import row_keys
from oreo_jax.decode.suffixes import append, pick, pick_rows, where_rows
from oreo_jax.decode.winners import Winners, keep_best
from oreo_jax.models import Cache, Shared


class Beams(NamedTuple):
  """State of the search: B partial answers a question, question-major.

  Q questions are in flight. They may have begun at different times; a question
  without an active beam is done, and another one may take its place.

  A is the room for an answer. It may be less than `plan.max_new_tokens`, as
  long as every active beam has room for another step (`has_room`).
  """

  steps: jax.Array  # i32[Q], steps that each question has taken
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
  reading: Reading  # of Q * B answers
  hashes: jax.Array  # u32[Q * B, 2], of the tokens of each answer
  active: jax.Array  # bool[Q * B]; others have left and only fill the shape
  winners: Winners
  proposed: jax.Array  # i32[Q], tokens the policy proposed so far
  # The B * K whole answers of each question, where the strategy keeps them.
  candidates: Winners | None


def advance(state: Beams, plan: Plan) -> Beams:
  """Takes one step of the search: propose, judge, choose, write, leave.

  Shapes never change. With Q questions, B beams a question and K proposals a
  beam, rows are either *beams* (Q * B) or *candidates* (Q * B * K): candidates
  i * K to i * K + K - 1 are what beam i proposed, so `parents[c] = c // K` is
  the beam that candidate c continues, and each question owns B * K candidates
  in a row. A beam that has left stays as a row that is not active: it proposes
  nothing, and its candidates are never chosen over a real one.

  Args:
    state: before the step.
    plan: of the search.

  Returns:
    The state after the step.
  """
  strategy = plan.strategy
  questions, beams = state.proposed.shape[0], strategy.beams
  parents = jnp.repeat(jnp.arange(questions * beams), strategy.proposals)

  # 1. Propose. Every active beam grows K branches to the end of their step, of
  # the answer, or of the room.
  stems = stems_of(state)
  grown = propose(plan, stems, _keys(state, plan))

  # 2. Judge. The value network reads all new tokens of a candidate in one go,
  # behind the cache of its parent, and the score ranks what it says.
  reading, critic_cache = judge(plan, stems, grown)
  all_values = reading.values
  if strategy.lookahead is None:
    scores = strategy.score(candidates_of(stems, grown, reading)[0])
  else:
    scores = look_ahead(
      plan,
      stems,
      grown,
      reading,
      critic_cache,
      problems=state.problems,
      steps=state.steps,
    )

  # 3. Choose. Of candidates that say the same the first one stands for all.
  # `top_k` always returns B of them: where there are fewer real candidates it
  # takes others too, and `valid` remembers which are real.
  hashes = extend_hashes(state.hashes[parents], grown.tokens, grown.lengths)
  alive = state.active[parents]
  valid = alive & ~is_repeated(hashes, alive, questions) & (scores > -jnp.inf)
  ranked = jnp.where(valid, scores, -jnp.inf).reshape(questions, -1)
  # i32[Q, B], counted within each question, as rows of one question never meet
  # those of another.
  chosen = jax.lax.top_k(ranked, beams)[1]
  parents_chosen = chosen // strategy.proposals
  chosen_scores, valid, reading, hashes, finished, lengths = pick_rows(
    (
      ranked.reshape(-1),
      valid,
      reading,
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
  before = pick(state.lengths, parents_chosen)
  tokens, logps = (
    append(pick(old, parents_chosen), pick(new, chosen), before)
    for old, new in ((state.tokens, grown.tokens), (state.logps, grown.logps))
  )
  cache = _append_cache(
    state.cache, grown.cache, parents_chosen, chosen, before
  )
  if state.critic_cache is not None and critic_cache is not None:
    critic_cache = _append_cache(
      state.critic_cache, critic_cache, parents_chosen, chosen, before
    )
  answered = before + lengths

  # 5. Leave. An answer that ended, or has no room or no step left, leaves its
  # beam and is remembered if it is the best so far.
  finished &= valid
  has_left = jnp.all(~state.active.reshape(questions, -1), axis=1)
  steps = jnp.where(has_left, state.steps, state.steps + 1)
  ends = jnp.repeat(steps >= strategy.max_steps, beams)
  goes_on = valid & ~finished & (answered < plan.max_new_tokens) & ~ends
  winners = keep_best(
    state.winners,
    Winners(
      _widen(tokens, plan.max_new_tokens),
      answered,
      _widen(logps, plan.max_new_tokens),
      finished,
      reading.values,
      chosen_scores,
    ),
    leaving=valid & ~goes_on,
  )
  candidates = state.candidates
  if candidates is not None:
    # A step is a whole answer, so that `grown` holds all of each.
    answers = Winners(
      tokens=grown.tokens,
      lengths=grown.lengths,
      logps=grown.logps,
      finished=grown.finished,
      values=all_values,
      scores=scores,
    )
    candidates = where_rows(
      jnp.repeat(has_left, strategy.candidates), candidates, answers
    )
  return state._replace(
    steps=steps,
    tokens=tokens,
    lengths=answered,
    logps=logps,
    fed=pick(grown.fed, chosen),
    stop_state=pick(grown.stop_state, chosen),
    cache=cache,
    critic_cache=critic_cache,
    reading=reading,
    hashes=hashes,
    active=goes_on,
    proposed=state.proposed
    + jnp.sum(grown.lengths.reshape(questions, -1), axis=1),
    winners=winners,
    candidates=candidates,
  )


def has_room(state: Beams, plan: Plan) -> jax.Array:
  """Returns bool[]: whether all active beams have room for another step."""
  room = state.tokens.shape[1]
  # `propose` grows no answer beyond `max_new_tokens`.
  if room >= plan.max_new_tokens:
    return jnp.asarray(True)
  longest = jnp.max(jnp.where(state.active, state.lengths, 0))
  return longest + plan.step_tokens <= room


def _widen(x: jax.Array, width: int) -> jax.Array:
  return jnp.pad(x, ((0, 0), (0, width - x.shape[1])))


def stems_of(state: Beams) -> Stems:
  """Returns the beams as texts that branches grow from."""
  critic_shared: tuple[Shared, ...] = ()
  if state.critic_prompts is not None and state.critic_cache is not None:
    critic_shared = (
      state.critic_prompts,
      Shared(state.critic_cache, state.lengths),
    )
  inside = jnp.arange(state.logps.shape[1])[None] < state.lengths[:, None]
  return Stems(
    shared=(state.prompt_cache, Shared(state.cache, state.lengths)),
    critic_shared=critic_shared,
    texts=(state.prompts, Text(state.tokens, state.lengths)),
    fed=state.fed,
    stop_state=state.stop_state,
    lengths=state.lengths,
    logps=jnp.sum(jnp.where(inside, state.logps, 0.0), axis=1),
    reading=state.reading,
    active=state.active,
  )


def _keys(state: Beams, plan: Plan) -> jax.Array:
  """Returns the keys of all proposals.

  The key of a proposal depends on its question, on the step that the question
  is at and on its place among the candidates. It does not depend on what else
  is in flight, nor on how many tokens earlier steps took.
  """
  count = plan.strategy.candidates
  questions = state.problems.shape[0]
  place = jnp.arange(count, dtype=jnp.int32)
  return row_keys(
    plan.key,
    jnp.repeat(state.problems, count),
    jnp.repeat(state.steps * count, count) + jnp.tile(place, questions),
  )


def _append_cache(
  old: Cache,
  new: Cache,
  parents: jax.Array,
  chosen: jax.Array,
  before: jax.Array,
) -> Cache:
  """Returns the parents' caches, the chosen ones' new slots behind them."""
  return jax.tree.map(
    lambda x, y: append(
      pick(x, parents, axis=1), pick(y, chosen, axis=1), before, axis=3
    ),
    old,
    new,
  )
