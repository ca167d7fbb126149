"""Trajectories: reading, tokenising with exact masks, packing, loading."""

from oreo_jax.data.chat import render_chat
from oreo_jax.data.encoding import tokenize_prompt, tokenize_text
from oreo_jax.data.errors import TrajectoryError
from oreo_jax.data.extras import Group, add_extra, unique_sequences
from oreo_jax.data.loader import Loader, make_loader
from oreo_jax.data.packing import Batch, pack
from oreo_jax.data.sampled import Sampled
from oreo_jax.data.schema import Pair, Trajectory, Turn
from oreo_jax.data.tokenizer import (
  load_tokenizer,
  make_tokenizer,
  save_tokenizer,
)
from oreo_jax.data.tokens import (
  Tokenized,
  tokenize_trajectories,
  tokenize_trajectory,
)
from oreo_jax.data.trajectories import (
  load_pairs,
  load_trajectories,
  save_pairs,
  save_trajectories,
  split_by_problem,
)

__all__ = [
  "Batch",
  "Group",
  "Loader",
  "Pair",
  "Sampled",
  "Tokenized",
  "Trajectory",
  "TrajectoryError",
  "Turn",
  "add_extra",
  "load_pairs",
  "load_tokenizer",
  "load_trajectories",
  "make_loader",
  "make_tokenizer",
  "pack",
  "render_chat",
  "save_pairs",
  "save_tokenizer",
  "save_trajectories",
  "split_by_problem",
  "tokenize_prompt",
  "tokenize_text",
  "tokenize_trajectories",
  "tokenize_trajectory",
  "unique_sequences",
]
