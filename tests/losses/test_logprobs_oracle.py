"""The chunked head against loops in float64, with extreme logits too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import logprobs as oracle
from oracles.oreo import gradient

from oreo_jax import losses

B, T, D, REF_D, V = 2, 5, 4, 3, 7
NAMES = {"reverse": "kl", "forward": "forward_kl"}


def inputs(seed, size=1.0):
  """hidden, head, tokens, ref_hidden, ref_head."""
  rng = np.random.default_rng(seed)
  return [
    rng.normal(size=(B, T, D)) * size,
    rng.normal(size=(D, V)),
    rng.integers(0, V, (B, T)).astype(np.int32),
    rng.normal(size=(B, T, REF_D)) * size,
    rng.normal(size=(REF_D, V)),
  ]


# Uneven weights, so that every output has its own gradient.
WEIGHTS = np.random.default_rng(0).normal(size=(2, B, T))


@functools.cache
def compiled(direction, chunk_size):
  """Jitted: outputs, and the gradient of a weighted sum of logps and kl."""

  def evaluate(hidden, head, tokens, ref_hidden, ref_head, scale):
    def loss(*arrays):
      out = losses.token_logprobs(
        *arrays[:2],
        tokens,
        ref_hidden=arrays[2],
        ref_head=arrays[3],
        chunk_size=chunk_size,
        # Half of the vocabulary a block; the two overlap.
        vocab_chunk=4 if chunk_size == 3 else 128,
        logit_scale=scale,
        kl_direction=direction,
      )
      weights = jnp.asarray(WEIGHTS, jnp.float32)
      return jnp.sum(weights[0] * out.logps + weights[1] * out.kl), out

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(
      hidden, head, ref_hidden, ref_head
    )

  return jax.jit(
    evaluate, compiler_options={"xla_backend_optimization_level": 0}
  )


def implementation(arrays, direction, chunk_size, dtype=jnp.float32, scale=1.0):
  cast = [
    jnp.asarray(x) if x.dtype == np.int32 else jnp.asarray(x, dtype)
    for x in arrays
  ]
  grads, out = compiled(direction, chunk_size)(*cast, jnp.float32(scale))
  # What the implementation was really given, rounding included.
  given = [
    np.asarray(x) if x.dtype == jnp.int32 else np.asarray(x, np.float64)
    for x in cast
  ]
  return grads, out, given


def check(out, given, direction, scale=1.0, **tolerance):
  hidden, head, tokens, ref_hidden, ref_head = given
  expected = oracle.token_logprobs(
    hidden, head, tokens, ref_hidden, ref_head, scale
  )
  for name, x in (
    ("logps", out.logps),
    ("ref_logps", out.ref_logps),
    ("entropy", out.entropy),
    (NAMES[direction], out.kl),
  ):
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, expected[name], err_msg=name, **tolerance)


# One chunk, one token a chunk, and a last chunk that is not full.
@pytest.mark.parametrize("chunk_size", [1, 3, 128])
@pytest.mark.parametrize("direction", NAMES)
def test_matches_oracle(direction, chunk_size):
  arrays = inputs(1)
  grads, out, given = implementation(arrays, direction, chunk_size, scale=0.7)
  check(out, given, direction, scale=0.7, rtol=2e-5, atol=1e-6)

  def loss(hidden, head):
    expected = oracle.token_logprobs(hidden, head, *given[2:], 0.7)
    parts = np.stack([expected["logps"], expected[NAMES[direction]]])
    return float((WEIGHTS * parts).sum())

  hidden, head = given[:2]
  for got, expected in (
    (
      grads[0],
      gradient(lambda x: loss(x, head), hidden, np.ones((B, T, D), bool)),
    ),
    (
      grads[1],
      gradient(lambda x: loss(hidden, x), head, np.ones((D, V), bool)),
    ),
  ):
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
  for x in grads[2:]:
    np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("chunk_size", [3, 128])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_bfloat16_inputs_meet_a_float32_softmax(size, chunk_size):
  """Exact for the rounded inputs: logits are not rounded to bfloat16 again."""
  arrays = inputs(2, size)
  _, out, given = implementation(arrays, "reverse", chunk_size, jnp.bfloat16)
  check(out, given, "reverse", rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [-1e4, -1e30, -3e38])
@pytest.mark.parametrize("chunk_size", [3, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forbidden_tokens(dtype, chunk_size, low):
  """Logits near minus infinity in policy and reference, tokens elsewhere.

  A constant in the hidden states times a row of the head makes them.
  """
  arrays = inputs(3)
  for hidden, head in ((arrays[0], arrays[1]), (arrays[3], arrays[4])):
    hidden[..., 0] = 1.0
    head[0, V - 2 :] = low
  arrays[2] %= V - 2
  grads, out, given = implementation(arrays, "reverse", chunk_size, dtype)
  check(out, given, "reverse", rtol=1e-4, atol=1e-4)
  for x in grads:
    assert np.all(np.isfinite(x))
  # As if the vocabulary ended before them.
  short = [*given[:2], *given[2:]]
  short[1], short[4] = short[1][:, : V - 2], short[4][:, : V - 2]
  check(out, short, "reverse", rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [-1e4, -1e30])
def test_a_target_the_policy_forbids(low):
  """Its tiny probability; far out only finite, so that squares stay so."""
  arrays = inputs(4)
  arrays[0][..., 0] = 1.0
  arrays[1][0, V - 1] = low
  arrays[2][:] = V - 1
  grads, out, given = implementation(arrays, "reverse", 128, jnp.bfloat16)
  if low > -1e8:
    check(out, given, "reverse", rtol=1e-4, atol=1e-4)
  assert np.all(out.logps < -9e3)
  for x in (out.logps**2, out.kl, *grads):
    assert np.all(np.isfinite(x))
