"""Decoding: sampling, generation over a KV cache, value-guided search."""

from oreo_jax.decode.batches import batched, generate_all, search_all
from oreo_jax.decode.beam import Search, step_beam_search
from oreo_jax.decode.generate import Generation, generate
from oreo_jax.decode.rank import (
  BestOfN,
  answer_values,
  best_of_n,
  majority_vote,
  reduce_values,
)
from oreo_jax.decode.sampling import ANCESTRAL, GREEDY, Sampler
from oreo_jax.decode.stops import DELIMITERS, Stops, make_stops, step_ends

__all__ = [
  "ANCESTRAL",
  "DELIMITERS",
  "GREEDY",
  "BestOfN",
  "Generation",
  "Sampler",
  "Search",
  "Stops",
  "answer_values",
  "batched",
  "best_of_n",
  "generate",
  "generate_all",
  "majority_vote",
  "make_stops",
  "reduce_values",
  "search_all",
  "step_beam_search",
  "step_ends",
]
