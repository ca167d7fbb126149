"""Drawing the next token: temperature, top-k, top-p.

Applied in that order, as `transformers` does; every function maps logits
f32[B, V] to logits f32[B, V] with the excluded tokens at -inf.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How a token is drawn; hashable, a static argument of the decode loop."""

  temperature: float = 1.0  # 0: the most likely token, no randomness
  top_k: int = 0  # keep the k most likely tokens; 0: all
  top_p: float = 1.0  # keep the smallest set of this probability; 1: all

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(
        "sampler: temperature and top_k are not negative and top_p lies in "
        f"(0, 1], got {self}"
      )


ANCESTRAL = Sampler()
GREEDY = Sampler(temperature=0.0)


def filter_logits(logits: jax.Array, sampler: Sampler) -> jax.Array:
  """Scales by the temperature and excludes what top-k and top-p exclude.

  Args:
    logits: f32[B, V].
    sampler: temperature must be positive.

  Returns:
    f32[B, V]; the softmax of it is what tokens are drawn from.
  """
  logits = logits / sampler.temperature
  if 0 < sampler.top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if sampler.top_p < 1.0:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # A token stays while the tokens before it do not fill top_p: the first
    # always does.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = jnp.where(before < sampler.top_p, ordered, jnp.inf)
    threshold = jnp.min(inside, axis=-1, keepdims=True)
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  return logits


def draw(
  key: jax.Array, logits: jax.Array, sampler: Sampler
) -> tuple[jax.Array, jax.Array]:
  """Draws one token a row.

  Args:
    key: a `jax.random.key`; not used at temperature 0.
    logits: f32[B, V].
    sampler: how.

  Returns:
    (tokens i32[B], logps f32[B]): the log-probability is the model's own, at
    temperature 1 and with no token excluded.
  """
  if sampler.temperature == 0.0:
    tokens = jnp.argmax(logits, axis=-1)
  else:
    tokens = jax.random.categorical(key, filter_logits(logits, sampler))
  tokens = tokens.astype(jnp.int32)
  logps = jax.nn.log_softmax(logits, axis=-1)
  return tokens, jnp.take_along_axis(logps, tokens[:, None], axis=1)[:, 0]
