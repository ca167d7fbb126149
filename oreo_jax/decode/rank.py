"""Choosing among whole answers: best-of-N by value, and votes."""

import collections
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.generate import Generation, generate, pad_prompts
from oreo_jax.decode.sampling import ANCESTRAL, Sampler
from oreo_jax.hosts import to_host
from oreo_jax.models import Params
from oreo_jax.sharding import constrain_batch

REDUCTIONS = ("final", "min", "mean")


class BestOfN(NamedTuple):
  """What `best_of_n` returns, on the host."""

  answers: Generation  # Q * N rows, those of one question side by side
  values: np.ndarray  # f32[Q, N], what each answer is ranked by
  choice: np.ndarray  # i64[Q], the winner of each question, 0..N-1


def best_of_n(
  policy: Params,
  critic: Params,
  prompts: Sequence[Sequence[int]] | np.ndarray,
  key: jax.Array,
  config: ModelConfig,
  *,
  num_samples: int,
  eos_ids: Sequence[int],
  max_new_tokens: int,
  sampler: Sampler = ANCESTRAL,
  reduction: str = "final",
  prompt_length: int | None = None,
  critic_config: ModelConfig | None = None,
) -> BestOfN:
  """Samples N answers a question and picks the one of highest value.

  Args:
    policy: what answers are sampled from.
    critic: a value network.
    prompts: token ids of each question, ragged.
    key: a `jax.random.key`.
    config: architecture of the policy.
    num_samples: N.
    eos_ids: tokens that end an answer.
    max_new_tokens: most tokens of an answer.
    sampler: how tokens are drawn.
    reduction: "final" ranks by V of the last state, "min" and "mean" by V
      over the states of the answer.
    prompt_length: room for the prompt; fix it over calls to compile once.
    critic_config: architecture of the critic when it is another one.

  Returns:
    A BestOfN. Its answers and values serve the votes too.
  """
  if reduction not in REDUCTIONS:
    raise ValueError(
      f"reduction: expected one of {REDUCTIONS}, got {reduction!r}"
    )
  answers = generate(
    policy,
    prompts,
    key,
    config,
    max_new_tokens=max_new_tokens,
    eos_ids=eos_ids,
    sampler=sampler,
    num_samples=num_samples,
    prompt_length=prompt_length,
  )
  along = answer_values(
    critic,
    prompts,
    answers,
    critic_config or config,
    prompt_length=prompt_length,
  )
  ranked = reduce_values(along, answers, reduction).reshape(-1, num_samples)
  return BestOfN(answers, ranked, np.argmax(ranked, axis=1))


def answer_values(
  critic: Params,
  prompts: Sequence[Sequence[int]] | np.ndarray,
  answers: Generation,
  config: ModelConfig,
  *,
  prompt_length: int | None = None,
) -> np.ndarray:
  """Returns V along each answer.

  Args:
    critic: a value network.
    prompts: token ids of Q questions.
    answers: of them, a multiple of Q rows, question-major.
    config: architecture of the critic.
    prompt_length: room for the prompt.

  Returns:
    f32[R, max_new_tokens + 1]: column 0 is V of the prompt, column i of the
    state after i tokens of the answer.
  """
  tokens, lengths = pad_prompts(prompts, prompt_length)
  samples = len(answers.lengths) // len(lengths)
  lengths = np.repeat(lengths, samples)
  width = answers.tokens.shape[1]
  whole = np.pad(np.repeat(tokens, samples, axis=0), ((0, 0), (0, width)))
  place = lengths[:, None] + np.arange(width)[None]
  np.put_along_axis(whole, place, answers.tokens, axis=1)
  return to_host(
    _values_along(
      critic, whole, lengths, answers.lengths, config=config, width=width
    )
  )


def _values_along_impl(critic, tokens, lengths, grown, *, config, width):
  index = jnp.arange(tokens.shape[1])[None]
  inside = index < (lengths + grown)[:, None]
  out = models.apply(
    critic,
    constrain_batch(tokens),
    config,
    segment_ids=inside.astype(jnp.int32),
  )
  place = (lengths - 1)[:, None] + jnp.arange(width + 1)[None]
  return jnp.take_along_axis(models.values(critic, out.hidden), place, axis=1)


_values_along = jax.jit(_values_along_impl, static_argnames=("config", "width"))


def reduce_values(
  values: np.ndarray, answers: Generation, reduction: str = "final"
) -> np.ndarray:
  """Returns f32[R]: one figure an answer, from V along it.

  The state after the end-of-sequence is left out: V was never trained there.
  """
  last = answers.lengths - answers.finished
  if reduction == "final":
    return np.take_along_axis(values, last[:, None], axis=1)[:, 0]
  inside = np.arange(values.shape[1])[None] <= last[:, None]
  if reduction == "min":
    return np.where(inside, values, np.inf).min(axis=1)
  return np.where(inside, values, 0.0).sum(axis=1) / inside.sum(axis=1)


def majority_vote(
  answers: Sequence[Hashable], weights: Sequence[float] | None = None
) -> int:
  """Returns the index of the first answer of the heaviest group.

  Args:
    answers: the final answers of one question; equal ones vote together. An
      empty answer has no vote unless all are empty.
    weights: of the votes; equal by default. Negative weights count as 0.

  Example:
    >>> majority_vote(["4", "5", "4"]), majority_vote(["4", "5"], [0.1, 0.9])
    (0, 1)
  """
  if weights is None:
    weights = [1.0] * len(answers)
  totals: dict = collections.defaultdict(float)
  for answer, weight in zip(answers, weights, strict=True):
    totals[answer] += max(float(weight), 0.0) if answer else 0.0
  return list(answers).index(max(totals, key=totals.__getitem__))
