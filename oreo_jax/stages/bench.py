"""Held-out problems and how they are answered: sampled, graded, valued."""

import time
from typing import NamedTuple

import numpy as np

from oreo_jax import decode
from oreo_jax.models import Params
from oreo_jax.stages.pipeline import grade, sample_responses, tokenize_problems
from oreo_jax.stages.workspace import Workspace
from oreo_jax.tasks.task import Problem


class Bench(NamedTuple):
  """Held-out problems and how they are answered."""

  workspace: Workspace
  problems: list[Problem]

  def sample(
    self,
    policy: Params,
    *,
    description: str,
    num_samples: int = 1,
    sampler: decode.Sampler = decode.GREEDY,
  ) -> tuple[np.ndarray, list[str], decode.Generation, float]:
    """Returns rewards [n * samples], texts, tokens and seconds."""
    settings = self.workspace.config.evaluate
    start = time.monotonic()
    texts, answers = sample_responses(
      self.workspace,
      policy,
      self.problems,
      description=description,
      seed=settings.seed,
      num_samples=num_samples,
      sampler=sampler,
      max_new_tokens=settings.max_new_tokens,
      batch_size=settings.batch_size,
    )
    seconds = time.monotonic() - start
    rewards = grade(self.workspace, self.problems, texts, answers.finished)
    return rewards, texts, answers, seconds

  def sampler(self) -> decode.Sampler:
    """Returns how samples and proposals are drawn."""
    settings = self.workspace.config.evaluate
    return decode.Sampler(settings.temperature, top_p=settings.top_p)

  def values_along(
    self, critic: Params, answers: decode.Generation
  ) -> np.ndarray:
    """Returns f32[R, max_new_tokens + 1], V along answers, in batches."""
    workspace = self.workspace
    prompts = tokenize_problems(workspace, self.problems)
    samples = len(answers.lengths) // len(prompts)
    size = max(workspace.config.evaluate.batch_size // samples, 1)
    size = min(size, len(prompts))
    along = np.zeros((len(answers.lengths), answers.tokens.shape[1] + 1))
    for indices, rows, room in decode.batched(prompts, size):
      place = (indices[:, None] * samples + np.arange(samples)).ravel()
      filled = np.resize(place, size * samples)  # the last batch is filled up
      part = decode.Generation(*(x[filled] for x in answers))
      found = decode.answer_values(
        critic, rows, part, workspace.config.model, prompt_length=room
      )
      along[place] = found[: len(place)]
    return along
