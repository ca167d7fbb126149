"""SFT against the float64 oracle and numbers worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cases
from oracles import supervised as oracle

from oreo_jax import losses

LAYOUTS = {
  "no ids": functools.partial(cases.unpacked, segment_ids=False),
  "a row each": cases.unpacked,
  "packed, gaps": functools.partial(cases.packed, gap=2),
}


def evaluate(laid_out):
  ids = laid_out["segment_ids"]
  loss = jax.value_and_grad(losses.sft_loss)
  return jax.jit(loss, compiler_options={"xla_backend_optimization_level": 0})(
    jnp.asarray(laid_out["logps"], jnp.float32),
    jnp.asarray(laid_out["action_mask"]),
    segment_ids=None if ids is None else jnp.asarray(ids),
  )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_oracle(layout):
  laid_out = LAYOUTS[layout](cases.trajectories(21))
  mask = laid_out["action_mask"]
  loss, gradient = evaluate(laid_out)
  expected = oracle.sft_loss(laid_out["logps"], mask, laid_out["segment_ids"])
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  # Linear: the gradient of a token is its weight, the same for all.
  np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)
  np.testing.assert_allclose(gradient[mask], -1 / mask.sum(), rtol=1e-5)


def test_worked_by_hand():
  logps = jnp.asarray([[-9.0, -1.0, -3.0, -5.0], [-9.0, -4.0, -9.0, -9.0]])
  mask = jnp.asarray([[False, True, True, True], [False, True, False, False]])
  assert float(losses.sft_loss(logps, mask)) == 13 / 4
  # Padding does not count, even where the mask forgets it.
  ids = jnp.asarray([[1, 1, 2, 0], [1, 1, 0, 0]])
  masked = losses.sft_loss(logps, mask, segment_ids=ids)
  np.testing.assert_allclose(masked, 8 / 3, rtol=1e-6)


def test_empty_mask_gives_zero_and_finite_gradients():
  laid_out = cases.packed(cases.trajectories(22))
  laid_out["action_mask"] = np.zeros_like(laid_out["action_mask"])
  loss, gradient = evaluate(laid_out)
  assert float(loss) == 0
  np.testing.assert_array_equal(gradient, 0)


def test_bad_input_is_refused():
  logps, mask = jnp.zeros((2, 4)), jnp.ones((2, 4), bool)
  with pytest.raises(ValueError):
    losses.sft_loss(logps, mask[:, :-1])
