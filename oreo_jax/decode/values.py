"""V along whole answers, and where it may be read.

V was trained at the states *before* tokens, and at which ones depends on what
one action was (`train.granularity`):

  token     the state before every token of the answer
  step      the state before every step, and before the end-of-sequence
  turn      the state before every turn, and before its end token
  response  the state before the answer alone

Only such a state says anything. In particular V was never trained behind the
end-of-sequence: read there, it picks answers by noise. A critic of response
level knows the question alone and cannot tell its answers apart, so it is
refused here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.generate import Generation
from oreo_jax.decode.prompts import Prompts, pad_prompts
from oreo_jax.decode.stops import Stops, step_ends
from oreo_jax.hosts import to_host
from oreo_jax.models import Params
from oreo_jax.sharding import constrain_batch

REDUCTIONS = ("final", "min", "mean")


def check_granularity(granularity: str) -> None:
  """Refuses to judge answers by a critic that cannot.

  Raises:
    ValueError: unless the granularity is "token", "step" or "turn".
  """
  if granularity not in ("token", "step", "turn"):
    raise ValueError(
      "granularity: expected a critic of 'token', 'step' or 'turn' level to"
      f" judge answers by, got {granularity!r}; one of response level is"
      " trained before the answer alone (--config.train.granularity)"
    )


def check_reduction(reduction: str) -> None:
  """Raises a ValueError for an unknown reduction."""
  if reduction not in REDUCTIONS:
    raise ValueError(
      f"reduction: expected one of {REDUCTIONS}, got {reduction!r}"
    )


def answer_values(
  critic: Params,
  prompts: Prompts,
  answers: Generation,
  config: ModelConfig,
  *,
  prompt_length: int | None = None,
) -> np.ndarray:
  """Returns V along each answer, one batch; `values_all` takes many prompts.

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
  texts = np.pad(np.repeat(tokens, samples, axis=0), ((0, 0), (0, width)))
  place = lengths[:, None] + np.arange(width)[None]
  np.put_along_axis(texts, place, answers.tokens, axis=1)
  return to_host(
    _values_along(
      critic, texts, lengths, answers.lengths, config=config, width=width
    )
  )


def _values_along_impl(
  critic: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  answered: jax.Array,
  *,
  config: ModelConfig,
  width: int,
) -> jax.Array:
  index = jnp.arange(tokens.shape[1])[None]
  inside = index < (lengths + answered)[:, None]
  out = models.apply(
    critic,
    constrain_batch(tokens),
    config,
    segment_ids=inside.astype(jnp.int32),
  )
  place = (lengths - 1)[:, None] + jnp.arange(width + 1)[None]
  return jnp.take_along_axis(models.values(critic, out.hidden), place, axis=1)


_values_along = jax.jit(_values_along_impl, static_argnames=("config", "width"))


def readable_states(
  answers: Generation,
  *,
  granularity: str = "token",
  stops: Stops | None = None,
) -> np.ndarray:
  """Returns bool[R, max_new_tokens + 1]: the states at which V may be read.

  Column i is the state after i tokens, as in `answer_values`. The state before
  the answer always counts. An answer that was cut off is read up to its last
  token at token level, up to its last whole step at step level.

  Args:
    answers: R of them.
    granularity: "token", "step" or "turn", what the critic was trained at.
    stops: where a step ends; needed at step level.

  Raises:
    ValueError: at response level, or at step level without `stops`.
  """
  check_granularity(granularity)
  last = answers.lengths - answers.finished
  columns = np.arange(answers.tokens.shape[1] + 1)[None]
  inside = columns <= last[:, None]
  if granularity == "token":
    return inside
  between = np.zeros_like(inside)
  between[:, 0] = True
  if granularity == "step":
    if stops is None:
      raise ValueError(
        "stops: expected where a step ends at step level, got None"
      )
    for row, end in enumerate(last):
      between[row, 1 : end + 1] = step_ends(stops, answers.tokens[row, :end])
  before_eos = answers.finished[:, None] & (columns == last[:, None])
  return inside & (between | before_eos)


def reduce_values(
  values: np.ndarray, readable: np.ndarray, reduction: str = "final"
) -> np.ndarray:
  """Returns f32[R]: one figure an answer, from V along it.

  Args:
    values: f32[R, M + 1], of `answer_values` or `values_all`.
    readable: bool[R, M + 1], of `readable_states`; the first column is True.
    reduction: "final" is V at the last readable state, "min" and "mean" are
      over all readable states.
  """
  check_reduction(reduction)
  if reduction == "min":
    return np.where(readable, values, np.inf).min(axis=1)
  if reduction == "mean":
    return np.where(readable, values, 0.0).sum(axis=1) / readable.sum(axis=1)
  last = readable.shape[1] - 1 - np.argmax(readable[:, ::-1], axis=1)
  return np.take_along_axis(values, last[:, None], axis=1)[:, 0]
