"""Decoding: sampling, generation over a KV cache, value-guided search."""

from oreo_jax.decode.batches import search_all, values_all
from oreo_jax.decode.beam import Search, step_beam_search
from oreo_jax.decode.continuous import (
  Answer,
  Usage,
  answer_requests,
  generate_all,
)
from oreo_jax.decode.engine import Completion, Engine, Prompt
from oreo_jax.decode.generate import Generation, generate
from oreo_jax.decode.rank import (
  BestOfN,
  best_of_n,
  majority_vote,
  rank_all,
  vote_weights,
)
from oreo_jax.decode.sampling import ANCESTRAL, GREEDY, Sampler
from oreo_jax.decode.schedule import Request
from oreo_jax.decode.scores import Candidates, by_logp, by_value
from oreo_jax.decode.stops import DELIMITERS, Stops, make_stops, step_ends
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
  "Answer",
  "BestOfN",
  "Candidates",
  "Completion",
  "Engine",
  "Generation",
  "Prompt",
  "Request",
  "Sampler",
  "Search",
  "Stops",
  "Usage",
  "answer_requests",
  "answer_values",
  "best_of_n",
  "by_logp",
  "by_value",
  "check_granularity",
  "generate",
  "generate_all",
  "majority_vote",
  "make_stops",
  "rank_all",
  "readable_states",
  "reduce_values",
  "search_all",
  "step_beam_search",
  "step_ends",
  "values_all",
  "vote_weights",
]
