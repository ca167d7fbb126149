"""Search guided by the value network (arXiv 2412.16145, section 5.4).

Step beam search: B partial answers a question, each proposes B next steps
sampled until a step ends; the B candidates of highest score, V by default, go
on. The whole search is one jitted loop around `step.advance`; the caches of
policy and value network advance together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax.config import ModelConfig
from oreo_jax.decode.generate import Generation, to_generation
from oreo_jax.decode.prompts import Prompts, pad_prompts
from oreo_jax.decode.sampling import ANCESTRAL, Sampler, sampling_rows
from oreo_jax.decode.scores import Score, by_value
from oreo_jax.decode.step import (
  Beams,
  Plan,
  Winners,
  advance,
  keep_best,
  start_beams,
)
from oreo_jax.decode.stops import Stops
from oreo_jax.decode.values import check_granularity
from oreo_jax.hosts import to_host
from oreo_jax.models import Params


class Search(NamedTuple):
  """What `step_beam_search` returns, on the host."""

  answers: Generation  # Q rows: the winning answers
  values: np.ndarray  # f32[Q], V of each; nan without a critic
  proposed: np.ndarray  # i32[Q], tokens the policy proposed
  scores: np.ndarray  # f32[Q], the score each won by


def step_beam_search(
  policy: Params,
  critic: Params | None,
  prompts: Prompts,
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
  score: Score = by_value,
  granularity: str = "token",
  prompt_length: int | None = None,
  critic_config: ModelConfig | None = None,
  problems: Sequence[int] | np.ndarray | None = None,
) -> Search:
  """Searches for the answer of highest score, step by step.

  Of the B * B candidates of a question, identical ones count once and the B of
  highest score go on. One that ended with an end-of-sequence leaves the beam
  as a finished answer. The finished answer of highest score wins; without one,
  the unfinished answer of highest score.

  Args:
    policy: proposes steps.
    critic: a value network, `init(..., head="value")`; None if `score` takes
      no values.
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
    score: what candidates are ranked by: `by_value`, `by_logp`, or a function
      of `Candidates`.
    granularity: "token" or "step", what the critic was trained at.
    prompt_length: room for the prompt; fix it over calls to compile once.
    critic_config: architecture of the critic when it is another one.
    problems: the number of each question, on which its draws depend, and on
      no other question; 0, 1, ... by default.

  Returns:
    A Search with one answer a question.

  Source: arXiv 2412.16145, section 5.4. That identical candidates count once
  is ours: without it a beam of short steps fills with copies of one answer.
  """
  if beams < 1:
    raise ValueError(f"beams: expected at least 1, got {beams}")
  if critic is None and score is by_value:
    raise ValueError("critic: score=by_value expects a value network, got None")
  check_granularity(granularity)
  tokens, lengths = pad_prompts(prompts, prompt_length)
  plan = Plan(
    policy=policy,
    critic=critic,
    stops=stops,
    key=key,
    sampling=jax.tree.map(np.squeeze, sampling_rows([sampler])),
    config=config,
    critic_config=critic_config or config,
    beams=beams,
    max_steps=max_steps,
    max_step_tokens=min(max_step_tokens, max_new_tokens),
    max_new_tokens=max_new_tokens,
    eos_ids=tuple(eos_ids),
    score=score,
    granularity=granularity,
  )
  if problems is None:
    problems = np.arange(len(lengths))
  problems = np.asarray(problems, np.int32)
  winners, proposed = to_host(run_plan(plan, tokens, lengths, problems))
  answers = to_generation(
    winners.tokens, winners.lengths, winners.finished, winners.logps
  )
  return Search(answers, winners.values, proposed, winners.scores)


@jax.jit
def run_plan(
  plan: Plan, prompts: jax.Array, lengths: jax.Array, problems: jax.Array
) -> tuple[Winners, jax.Array]:
  """Runs a search as one program, of which the outputs stay on the devices.

  Args:
    plan: of the search.
    prompts: i32[Q, W], padded behind.
    lengths: i32[Q], tokens of each prompt.
    problems: i32[Q], the number of each question.

  Returns:
    The winners, and i32[Q], tokens the policy proposed.
  """

  def unfinished(state: Beams) -> jax.Array:
    return (state.step < plan.max_steps) & jnp.any(state.active)

  end = jax.lax.while_loop(
    unfinished,
    functools.partial(advance, plan=plan),
    start_beams(plan, prompts, lengths, problems),
  )
  # The steps have run out: what is still in a beam competes, unfinished.
  winners = keep_best(
    end, leaving=end.active, finished=jnp.zeros_like(end.active)
  )
  return winners, end.proposed
