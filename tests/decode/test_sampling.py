"""Temperature, top-k and top-p against a NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oreo_jax.decode import ANCESTRAL, GREEDY, Sampler
from oreo_jax.decode.sampling import draw, filter_logits


def probabilities(logits, *, temperature, top_k, top_p):
  """What a token is drawn from, a row at a time, in float64."""
  out = np.zeros(logits.shape)
  for row, scores in enumerate(np.asarray(logits, np.float64) / temperature):
    order = np.argsort(-scores, kind="stable")
    likeliest = order[: top_k or None]
    weights = np.exp(scores[likeliest] - scores[likeliest].max())
    weights /= weights.sum()
    chosen, mass = [], 0.0
    for token, weight in zip(likeliest, weights, strict=True):
      if mass >= top_p and top_p < 1.0:
        break
      chosen.append(token)
      mass += weight
    weights = np.exp(scores[chosen] - scores[chosen].max())
    out[row, chosen] = weights / weights.sum()
  return out


@pytest.mark.parametrize(
  "options",
  [
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_k": 99},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"temperature": 1.7, "top_k": 4, "top_p": 0.7},
  ],
)
def test_filter_matches_the_oracle(options):
  options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
  logits = np.random.default_rng(0).normal(0, 2, (64, 9)).astype(np.float32)
  probs = jax.nn.softmax(filter_logits(jnp.asarray(logits), Sampler(**options)))
  want = probabilities(logits, **options)
  np.testing.assert_array_equal(np.asarray(probs) > 0, want > 0)
  np.testing.assert_allclose(probs, want, rtol=1e-4, atol=1e-7)
  assert (want > 0).any(axis=1).all()


@pytest.mark.parametrize(
  "options", [{}, {"top_k": 3}, {"temperature": 0.5, "top_p": 0.8}]
)
def test_draws_follow_the_filtered_softmax(options):
  sampler = Sampler(**options)
  row = np.array([[2.0, 1.5, 0.0, -1.0, 0.5, 1.0]], np.float32)
  count = 20_000
  logits = jnp.asarray(np.repeat(row, count, axis=0))
  tokens, logps = jax.jit(draw, static_argnums=2)(
    jax.random.key(3), logits, sampler
  )
  want = probabilities(
    row,
    temperature=sampler.temperature,
    top_k=sampler.top_k,
    top_p=sampler.top_p,
  )[0]
  counts = np.bincount(np.asarray(tokens), minlength=6)
  possible = want > 0
  assert not counts[~possible].any()
  expected = want[possible] * count
  statistic = np.sum((counts[possible] - expected) ** 2 / expected)
  # The 99.9th percentile of chi-square with 5 degrees of freedom.
  assert statistic < 20.5
  # The log-probability is the model's own, whatever the filter.
  model = row[0] - np.log(np.exp(row[0]).sum())
  np.testing.assert_allclose(logps, model[np.asarray(tokens)], atol=1e-5)


def test_temperature_zero_is_the_argmax():
  logits = jnp.asarray([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
  tokens, _ = draw(jax.random.key(0), logits, GREEDY)
  assert tokens.tolist() == [1, 0]


def test_rows_have_draws_of_their_own():
  tokens, _ = draw(jax.random.key(0), jnp.zeros((500, 4)), ANCESTRAL)
  assert set(np.asarray(tokens).tolist()) == {0, 1, 2, 3}
