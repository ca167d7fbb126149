"""Searching as scripts around a sampler do: every text is read from its start.

The step is that of oreo_jax, with other ways to propose and to judge. Draws,
choices and results are therefore the same, and only the reading differs.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models
from oreo_jax.decode import branches, step
from oreo_jax.decode.prompts import pad_prompts
from oreo_jax.decode.search import admit_questions, start_slots, widen
from oreo_jax.decode.suffixes import append
from oreo_jax.models import Shared

_ROUND_UP = 32  # tokens; texts of a step are padded to a multiple
_FIRST_ROOM = 64  # tokens, of answers, as in `oreo_jax.decode.search`


def texts_of(stems, width: int, grown=None):
  """Returns whole texts, left-aligned, and their lengths.

  Args:
    stems: R texts, in levels.
    width: room for a text.
    grown: branches of them, whose tokens go behind.

  Returns:
    (tokens i32[R or R * K, width], lengths i32[R or R * K]).
  """
  levels = [(text.tokens, text.lengths) for text in stems.texts]
  if grown is not None:
    levels.append((grown.tokens, grown.lengths))
  rows = levels[-1][1].shape[0]
  tokens = jnp.zeros((rows, width), jnp.int32)
  lengths = jnp.zeros(rows, jnp.int32)
  for new, count in levels:
    share = rows // count.shape[0]
    new = jnp.repeat(new[:, :width], share, axis=0)
    tokens = append(tokens, new, lengths)
    lengths += jnp.repeat(count, share)
  return tokens, lengths


def propose_anew(plan, stems, keys, *, width: int):
  """Does `branches.propose`, the policy reading the text of each beam anew."""
  tokens, lengths = texts_of(stems, width)
  # The last token is fed to the first step of decoding.
  out = models.prefill(plan.policy, tokens, plan.config, lengths=lengths - 1)
  stems = stems._replace(shared=(Shared(out.cache, lengths - 1),))
  return branches.propose(plan, stems, keys)


def judge_anew(plan, stems, grown, *, width: int):
  """Does `branches.judge` at token level, reading all candidates anew.

  Returns:
    (the reading, of which V at the last state alone means something; None).
  """
  tokens, lengths = texts_of(stems, width, grown)
  hidden = models.apply(plan.critic, tokens, plan.critic_config).hidden
  # V is not read at an end-of-sequence, but before it.
  last = lengths - 1 - grown.finished.astype(jnp.int32)
  rows = jnp.arange(last.shape[0])
  values = models.values(plan.critic, hidden[rows, last])
  return branches.first_reading(values), None


@functools.partial(
  jax.jit, static_argnames=("width", "policy_too"), donate_argnames=("state",)
)
def take_step(plan, state, *, width: int, policy_too: bool):
  """Takes one step of all questions.

  Args:
    plan: of the search, of token level, by value.
    state: its slots, without the critic's caches.
    width: room for the text of a candidate.
    policy_too: the policy reads texts anew as well.
  """
  ways = {"judge": functools.partial(judge_anew, width=width)}
  if policy_too:
    ways["propose"] = functools.partial(propose_anew, width=width)
  with mock.patch.multiple(step, **ways):
    return step.advance(state, plan)


def search_anew(plan, prompts, *, policy_too: bool = False):
  """Searches all prompts together, step by step from the host.

  Args:
    plan: of the search, of token level, by value.
    prompts: token ids of Q questions.
    policy_too: the policy reads texts anew as well.

  Returns:
    (answers, lists of token ids, values f32[Q]).
  """
  tokens, lengths = pad_prompts(prompts)
  questions, room = tokens.shape
  order = np.arange(questions, dtype=np.int32)
  answers = min(_FIRST_ROOM, plan.max_new_tokens)
  state = start_slots(plan, slots=questions, room=room, answer_room=answers)
  # Nothing is kept for the critic, so that prompts are not read for it either.
  state = state._replace(critic_prompts=None, critic_cache=None)
  state = admit_questions(plan, state, order, tokens, lengths, order)
  longest = room
  while np.asarray(state.active).any():
    if not step.has_room(state, plan):
      answers = min(2 * answers, plan.max_new_tokens)
      state = widen(state, room=answers)
    longest = min(longest + plan.step_tokens, room + plan.max_new_tokens)
    width = -(-longest // _ROUND_UP) * _ROUND_UP
    state = take_step(plan, state, width=width, policy_too=policy_too)
  best = jax.device_get(state.winners)
  rows = zip(best.tokens, best.lengths, strict=True)
  return [row[:length].tolist() for row, length in rows], best.values
