"""Candidates judged by the tree of steps below them.

A candidate step has K branches, each of these K branches, and so on to depth d;
a branch that has finished is a leaf. Branches are one more level of shared text
for the policy and for the critic, so nothing of what a tree has in common is
read or held twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from oreo_jax.decode.branches import (
  Reading,
  Stems,
  candidates_of,
  judge,
  propose,
)
from oreo_jax.decode.grow import Rows, Text
from oreo_jax.decode.plan import Plan
from oreo_jax.decode.sampling import row_keys
from oreo_jax.models import Cache, Shared


def look_ahead(
  plan: Plan,
  stems: Stems,
  grown: Rows,
  reading: Reading,
  critic_cache: Cache | None,
  *,
  problems: jax.Array,
  steps: jax.Array,
  prior: jax.Array | None = None,
  depth: int = 1,
) -> jax.Array:
  """Returns the score of each branch: that of the best leaf at or below it.

  A leaf is worth prior_weight * log pi(its steps) + score(leaf), where its
  steps are those from the stem on and the score is V by default. With depth d
  of the plan, a branch at depth d is a leaf itself.

  Args:
    plan: of the search, with a `Lookahead`.
    stems: R texts.
    grown: R * n branches of them.
    reading: what the critic says of the branches.
    critic_cache: of their new tokens.
    problems: i32[Q], the number of each question, of which R / Q texts are.
    steps: i32[Q], the step of the search that each question is at.
    prior: f32[R], the prior term of the steps that led from the first stem to
      these; 0 by default.
    depth: of the branches; 1 for the candidates.

  Returns:
    f32[R * n].

  Source: arXiv 2402.16181 (SLINVIT), in which an LLM gives the prior and the
  leaves are judged by a value; the prior's weight is its lambda.
  """
  tree = plan.strategy.lookahead
  if tree is None:
    raise ValueError("lookahead: expected a plan with one, got None")
  ranked, new_logps = candidates_of(stems, grown, reading)
  branches = grown.lengths.shape[0] // stems.fed.shape[0]
  prior = jnp.zeros(stems.fed.shape, jnp.float32) if prior is None else prior
  prior = jnp.repeat(prior, branches)
  # A weight of 0 must not make nan of a log-probability of -inf.
  if tree.prior_weight:
    prior += tree.prior_weight * new_logps
  own = prior + plan.strategy.score(ranked)
  if depth == tree.depth:
    return own
  goes_on = jnp.repeat(stems.active, branches) & ~grown.finished
  goes_on &= ranked.lengths < plan.max_new_tokens
  critic_shared = stems.critic_shared
  if critic_cache is not None:
    critic_shared = (*critic_shared, Shared(critic_cache, grown.lengths))
  nodes = Stems(
    # All rows began at slot 0 together: slots are in the order of tokens.
    shared=(*stems.shared, Shared(grown.cache, grown.lengths)),
    critic_shared=critic_shared,
    texts=(*stems.texts, Text(grown.tokens, grown.lengths)),
    fed=grown.fed,
    stop_state=grown.stop_state,
    lengths=ranked.lengths,
    logps=ranked.logps,
    reading=reading,
    active=goes_on,
  )
  # A key of its own for every branch of the tree, whatever else is in flight.
  count = goes_on.shape[0] * tree.breadth
  per_question = count // problems.shape[0]
  keys = row_keys(
    jax.random.fold_in(plan.key, 2**31 - depth),
    jnp.repeat(problems, per_question),
    jnp.repeat(steps, per_question) * per_question
    + jnp.arange(count, dtype=jnp.int32) % per_question,
  )
  children = propose(plan, nodes, keys)
  below_reading, below_cache = judge(plan, nodes, children)
  below = look_ahead(
    plan,
    nodes,
    children,
    below_reading,
    below_cache,
    problems=problems,
    steps=steps,
    prior=prior,
    depth=depth + 1,
  )
  best = jnp.max(below.reshape(-1, tree.breadth), axis=1)
  return jnp.where(goes_on, best, own)
