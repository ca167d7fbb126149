"""Step beam search guided by the value network (arXiv 2412.16145, 5.4).

B partial answers a question, each proposes B next steps sampled until a step
ends; the B candidates of highest score, V by default, go on. `search.search` is
what runs it, and `plan.Strategy` says what else it can do.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from oreo_jax.config import ModelConfig
from oreo_jax.decode.plan import Strategy, make_plan
from oreo_jax.decode.prompts import Prompts
from oreo_jax.decode.sampling import ANCESTRAL, Sampler
from oreo_jax.decode.scores import Score, by_value
from oreo_jax.decode.search import Search, search
from oreo_jax.decode.stops import Stops
from oreo_jax.models import Params


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

  All questions are in flight together. For more than fit at once, or for
  another strategy, make a plan and call `search`.

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
    score: what candidates are ranked by, such as `by_value`, `by_logp`, or a
      function of `Candidates`.
    granularity: "token", "step" or "turn", what the critic was trained at.
    prompt_length: room for the prompt; fix it over calls to compile once.
    critic_config: architecture of the critic when it is another one.
    problems: the number of each question, on which its draws depend, and on
      no other question; 0, 1, ... by default.

  Returns:
    A Search with one answer a question.

  Source: arXiv 2412.16145, section 5.4. That identical candidates count once
  is ours: without it a beam of short steps fills with copies of one answer.
  """
  plan = make_plan(
    policy,
    critic,
    key,
    config,
    strategy=Strategy(
      beams=beams,
      max_steps=max_steps,
      max_step_tokens=max_step_tokens,
      score=score,
    ),
    stops=stops,
    eos_ids=eos_ids,
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    granularity=granularity,
    critic_config=critic_config,
  )
  return search(
    plan,
    prompts,
    slots=len(prompts),
    prompt_length=prompt_length,
    problems=problems,
  )
