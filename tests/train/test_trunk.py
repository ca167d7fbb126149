"""Networks on one frozen base share its first layers, and nothing changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny
from oracles.adapters import MODEL, ROWS, loss_and_gradient, make, trained_state

from oreo_jax import models
from oreo_jax.data import make_loader
from oreo_jax.sharding import shard_batch
from oreo_jax.train import forward as forward_module
from oreo_jax.train import init_state, make_train_step, state_shardings
from oreo_jax.train.forward import forward
from oreo_jax.train.roles import trunk_depth

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@functools.cache
def batch():
  """Rows with several sequences each, and with padding."""
  loader = make_loader(
    tiny.draw_sequences(16), batch_size=ROWS, row_length=16, shuffle=False
  )
  assert loader.batch(0).segment_ids.max() > 1
  return loader.batch(0)


@pytest.mark.parametrize(
  "options",
  [
    {"critic": "lora"},
    slow({"critic": "lora", "kl": "k3", "ema_decay": 0.9}),
    slow({"critic": "shared"}),
    slow({"critic": "separate"}),
    slow({"critic": "lora", "lora": False}),
    slow({"critic": "lora", "last": 2, "kl": "forward"}),
    slow({"critic": "shared", "ema_decay": 0.9}),
    slow({"objective": "value"}),
    slow({"objective": "rejection"}),
  ],
  ids=str,
)
def test_losses_and_gradients_are_those_of_networks_run_apart(
  monkeypatch, options
):
  setup, base = make(**options), tiny.draw_params(MODEL)
  assert trunk_depth(setup) == 3 - setup.lora.last_layers
  loss, gradient = loss_and_gradient(setup, base, batch())
  # Without a shared trunk every network runs all of its layers.
  monkeypatch.setattr(forward_module, "trunk_depth", lambda setup: 0)
  want_loss, want = loss_and_gradient(setup, base, batch())
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  tiny.assert_trees_close(gradient, want, rtol=1e-5, atol=1e-5)
  assert any(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(want))


def test_the_shared_layers_run_once():
  setup, base = make(), tiny.draw_params(MODEL)
  params, _ = trained_state(setup, base)

  def layers_run(setup):
    """Counts the layers of all passes: a scan's length is its layers'."""
    jaxpr = jax.make_jaxpr(
      lambda params: forward(params, None, base, batch(), setup)
    )(params)
    # The chunked head scans too, but over chunks: rows fit one chunk here.
    return sum(
      equation.params["length"]
      for equation in jaxpr.eqns
      if equation.primitive.name == "scan"
    )

  assert layers_run(setup) == 2 + 3 * 1
  apart = make(last=0)
  assert trunk_depth(apart) == 0
  assert layers_run(apart) == 3 * 3


@pytest.mark.parametrize(
  "options, depth",
  [
    ({}, 2),
    ({"last": 3}, 0),
    ({"last": 0}, 0),
    ({"lora": False, "critic": "separate"}, 0),
    ({"lora": False, "critic": "shared"}, 0),
    ({"objective": "value", "critic": "separate"}, 0),
    ({"objective": "value", "critic": "lora"}, 2),
    ({"objective": "value", "critic": "shared", "lora": False}, 0),
    ({"objective": "dpo"}, 2),
  ],
  ids=str,
)
def test_what_is_shared_follows_from_the_adapters(options, depth):
  assert trunk_depth(make(**options)) == depth


@pytest.mark.slow
def test_a_sharded_step_is_that_of_one_device(monkeypatch):
  setup = make(ema_decay=0.9)
  base = tiny.draw_params(MODEL)

  def step_on(mesh):
    state = init_state(jax.random.key(1), setup, base)
    state = jax.device_put(state, state_shardings(setup, state, mesh))
    step = make_train_step(setup, state, mesh)
    with jax.set_mesh(mesh):
      placed = tiny.place(base, MODEL, mesh)
      for _ in range(2):
        state, metrics = step(state, placed, shard_batch(batch(), mesh))
    return jax.device_get((state.params, metrics))

  params, metrics = step_on(tiny.mesh(data=2, fsdp=2, tensor=2))
  monkeypatch.setattr(forward_module, "trunk_depth", lambda setup: 0)
  want_params, want_metrics = step_on(tiny.mesh())
  tiny.assert_trees_close(metrics, want_metrics, rtol=1e-5, atol=1e-5)
  tiny.assert_trees_close(params, want_params, rtol=1e-4, atol=1e-4)


def test_layers_run_in_two_ranges_are_the_model():
  base = tiny.draw_params(MODEL)
  rows = batch()
  run = functools.partial(
    models.apply,
    base,
    rows.tokens,
    MODEL,
    positions=rows.positions,
    segment_ids=rows.segment_ids,
  )
  want = run().hidden
  for depth in (1, 2, 3):
    states = models.trunk(
      base, rows.tokens, MODEL, depth=depth, segment_ids=rows.segment_ids
    )
    got = run(start=states, start_layer=depth).hidden
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_trunk_that_does_not_fit_is_an_error():
  base = tiny.draw_params(MODEL)
  tokens = batch().tokens
  with pytest.raises(ValueError, match="depth is 4, expected 1..3"):
    models.trunk(base, tokens, MODEL, depth=4)
  with pytest.raises(ValueError, match="start: expected .8, 16, 16."):
    models.apply(base, tokens, MODEL, start=jnp.zeros((8, 16, 3)))
