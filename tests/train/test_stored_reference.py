"""The reference once before training: the losses of a reference in the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny
from oracles.adapters import MODEL, ROW_LENGTH, loss_and_gradient, make

from oreo_jax.config import Config, ConfigError, TrainConfig
from oreo_jax.data import make_loader
from oreo_jax.scoring import store_reference
from oreo_jax.sharding import shard_batch
from oreo_jax.train import init_state, make_train_step
from oreo_jax.train.forward import REF_LOGPS
from oreo_jax.train.roles import needs_base, roles_of


def stored(sequences, base, mesh=None, config=MODEL):
  mesh = mesh or tiny.mesh()
  with jax.set_mesh(mesh):
    return store_reference(
      sequences,
      base,
      config,
      mesh,
      row_length=ROW_LENGTH,
      batch_size=4,
      chunk_size=8,
      vocab_chunk=5,
    )


def sides(setup, base, sequences):
  """The loss and its gradient on a batch of an epoch of another packing."""
  loader = make_loader(sequences, batch_size=8, row_length=ROW_LENGTH, epochs=2)
  return loss_and_gradient(setup, base, loader.batch(1))


@pytest.mark.parametrize(
  "objective", ["oreo", pytest.param("dpo", marks=pytest.mark.slow)]
)
def test_losses_and_gradients_are_those_of_a_reference_in_the_step(objective):
  base = tiny.draw_params(MODEL)
  sequences = tiny.draw_sequences(16)
  if objective == "dpo":
    sequences = list(zip(sequences[::2], sequences[1::2], strict=True))
  online = make(objective, kl="k3", critic="shared")
  want_loss, want = sides(online, base, sequences)
  once = make(objective, kl="k3", critic="shared", reference="stored")
  loss, gradient = sides(once, base, stored(sequences, base))
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  tiny.assert_trees_close(gradient, want, rtol=1e-5, atol=1e-5)
  assert float(jnp.abs(want_loss)) > 1e-3


def test_a_step_holds_no_reference():
  setup = make(kl="k3", lora=False, critic="shared", last=0, reference="stored")
  assert "reference" not in {role.name for role in roles_of(setup)}
  assert not needs_base(setup)
  base = tiny.draw_params(MODEL)
  loader = make_loader(
    stored(tiny.draw_sequences(16), base), batch_size=8, row_length=ROW_LENGTH
  )
  state = init_state(jax.random.key(0), setup, base)
  step = make_train_step(setup, state, tiny.mesh())
  with jax.set_mesh(tiny.mesh()):
    _, metrics = step(state, None, shard_batch(loader.batch(0), tiny.mesh()))
  # The policy is the reference still.
  assert float(metrics["policy/kl"]) == pytest.approx(0.0, abs=1e-6)
  assert np.isfinite(float(metrics["loss"]))


def test_log_probabilities_do_not_depend_on_masks_and_neighbours():
  base = tiny.draw_params(MODEL)
  sequences = tiny.draw_sequences(5)
  prompts = [
    s._replace(action_mask=np.zeros_like(s.action_mask)) for s in sequences
  ]
  together = stored(sequences + prompts, base)
  (alone,) = stored(sequences[3:4], base)
  for index in (3, 8):
    logps = together[index].extras[REF_LOGPS]
    assert logps[0] == 0 and (logps[1:] < 0).all()
    np.testing.assert_allclose(logps, alone.extras[REF_LOGPS], atol=1e-5)


def test_what_a_stored_reference_cannot_do_is_an_error():
  config = Config(train=TrainConfig(reference="stored"))
  with pytest.raises(ConfigError, match="train.reference=stored"):
    config.validate()
  dataclasses.replace(
    config, train=TrainConfig(reference="stored", kl="k3")
  ).validate()
  with pytest.raises(ConfigError, match="--config.train.reference=online"):
    make("kto", kl="k3", reference="stored")
