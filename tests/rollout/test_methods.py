"""How held-out problems are answered."""

from oreo_jax.config import EvaluateConfig
from oreo_jax.decode import Sampler
from oreo_jax.rollout.methods import Exam


def test_samples_and_proposals_are_drawn_as_the_settings_say():
  settings = EvaluateConfig(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)
  exam = Exam([], None, None, None, settings)
  assert exam.sampler == Sampler(0.5, 3, 0.9, 0.1)
