"""Rollouts: a policy answers problems, and a verifier grades the answers."""

from oreo_jax.rollout.answers import (
  Answers,
  answer_problems,
  grade_texts,
  grading_counts,
)
from oreo_jax.rollout.codec import Codec

__all__ = [
  "Answers",
  "Codec",
  "answer_problems",
  "grade_texts",
  "grading_counts",
]
