"""Rollouts: a policy answers problems, and a verifier grades the answers."""

from oreo_jax.rollout.answers import (
  Answers,
  answer_problems,
  grade_texts,
  grading_counts,
)
from oreo_jax.rollout.codec import Codec
from oreo_jax.rollout.collection import (
  Collected,
  collect_answers,
  graded_trajectories,
)
from oreo_jax.rollout.episodes import Episode, Start, play_episodes
from oreo_jax.rollout.play import Player, agent_methods, collect_episodes

__all__ = [
  "Answers",
  "Codec",
  "Collected",
  "Episode",
  "Player",
  "Start",
  "agent_methods",
  "answer_problems",
  "collect_answers",
  "collect_episodes",
  "grade_texts",
  "graded_trajectories",
  "grading_counts",
  "play_episodes",
]
