"""Decoding: sampling, generation over a KV cache, value-guided search."""

from oreo_jax.decode.batches import values_all
from oreo_jax.decode.beam import step_beam_search
from oreo_jax.decode.continuous import (
  Answer,
  Usage,
  answer_requests,
  generate_all,
)
from oreo_jax.decode.engine import Completion, Engine, Prompt
from oreo_jax.decode.generate import Generation, generate
from oreo_jax.decode.plan import (
  Lookahead,
  Plan,
  Strategy,
  best_of,
  best_of_actions,
  look_ahead_search,
  make_plan,
)
from oreo_jax.decode.rank import (
  BestOfN,
  best_of_n,
  majority_vote,
  rank_all,
  vote_weights,
)
from oreo_jax.decode.sampling import ANCESTRAL, GREEDY, Sampler
from oreo_jax.decode.schedule import Request
from oreo_jax.decode.scores import (
  Candidates,
  by_logp,
  by_mean_value,
  by_min_value,
  by_value,
  mixture,
)
from oreo_jax.decode.search import Search, search
from oreo_jax.decode.stops import (
  DELIMITERS,
  Stops,
  make_stops,
  no_stops,
  step_ends,
)
from oreo_jax.decode.turns import Action, Conversations
from oreo_jax.decode.values import (
  answer_values,
  check_granularity,
  readable_states,
  reduce_values,
)

__all__ = [
  "ANCESTRAL",
  "DELIMITERS",
  "GREEDY",
  "Action",
  "Answer",
  "BestOfN",
  "Candidates",
  "Completion",
  "Conversations",
  "Engine",
  "Generation",
  "Lookahead",
  "Plan",
  "Prompt",
  "Request",
  "Sampler",
  "Search",
  "Stops",
  "Strategy",
  "Usage",
  "answer_requests",
  "answer_values",
  "best_of",
  "best_of_actions",
  "best_of_n",
  "by_logp",
  "by_mean_value",
  "by_min_value",
  "by_value",
  "check_granularity",
  "generate",
  "generate_all",
  "look_ahead_search",
  "majority_vote",
  "make_plan",
  "make_stops",
  "mixture",
  "no_stops",
  "rank_all",
  "readable_states",
  "reduce_values",
  "search",
  "step_beam_search",
  "step_ends",
  "values_all",
  "vote_weights",
]
