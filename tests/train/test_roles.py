"""Which networks a stage has, and what it saves of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.config import Config, CriticConfig, LoraConfig, TrainConfig
from oreo_jax.data import make_loader
from oreo_jax.sharding import shard_batch
from oreo_jax.train import (
  OBJECTIVES,
  Objective,
  full_configs,
  full_params,
  init_state,
  make_setup,
  make_train_step,
  plain_models,
  state_shardings,
  train_step,
)
from oreo_jax.train.checkpoint import Checkpoints
from oreo_jax.train.forward import forward
from oreo_jax.train.objective import Rows
from oreo_jax.train.roles import ROLES, needs_base, roles_of

ROWS = 4
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def make(objective="oreo", *, lora=False, critic="separate", **changes):
  config = Config(
    model=dataclasses.replace(tiny.MODEL),
    critic=CriticConfig(kind=critic),
    lora=LoraConfig(policy=lora, rank=2, alpha=4.0),
    train=TrainConfig(
      objective=objective,
      batch_size=ROWS,
      lr=0.1,
      critic_lr=0.1,
      warmup=0.0,
      **changes,
    ),
  )
  config.validate()
  return make_setup(config, OBJECTIVES[objective], 4, max_segments=8)


@functools.cache
def batch():
  loader = make_loader(
    tiny.draw_sequences(8), batch_size=ROWS, row_length=16, shuffle=False
  )
  return loader.batch(0)


def train_a_step(setup, base):
  """Returns the state after a step, and the frozen base it may stand on."""
  mesh = tiny.mesh()
  state = init_state(jax.random.key(1), setup, base)
  state = jax.device_put(state, state_shardings(setup, state, mesh))
  step = make_train_step(setup, state, mesh)
  with jax.set_mesh(mesh):
    state, metrics = step(
      state, base if needs_base(setup) else None, shard_batch(batch(), mesh)
    )
  assert all(np.isfinite(float(x)) for x in metrics.values())
  return state


@pytest.mark.parametrize(
  "objective, lora, critic",
  [
    ("oreo", True, "separate"),
    ("oreo", True, "shared"),
    slow("oreo", True, "lora"),
    slow("oreo", False, "separate"),
    slow("oreo", False, "lora"),
    slow("oreo", False, "shared"),
    slow("value", True, "separate"),
    slow("value", True, "lora"),
    slow("value", True, "shared"),
  ],
)
def test_every_pair_of_networks_is_trained_saved_and_read(
  tmp_path, objective, lora, critic
):
  setup = make(objective, lora=lora, critic=critic)
  base = tiny.draw_params()
  state = train_a_step(setup, base)
  full = full_params(state.params, base, setup)
  expected = {"oreo": {"policy", "critic"}, "value": {"critic"}}[objective]
  assert set(full) == expected

  plain, config = plain_models(full, setup)
  assert set(plain) == expected and config == tiny.MODEL
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, plain)
    shapes = {
      name: models.abstract_params(config, head=ROLES[name].head)
      for name in plain
    }
    again = checkpoints.restore(shapes)

  for name, architecture in full_configs(setup).items():
    if name in full and architecture.lora_rank:
      models.save_adapter(
        tmp_path / "adapters" / name, full[name], architecture
      )

  # What was saved says the same as what was trained, adapters and all.
  out = forward(state.params, None, base, batch(), setup)
  run = functools.partial(
    models.apply,
    tokens=batch().tokens,
    config=config,
    positions=batch().positions,
    segment_ids=batch().segment_ids,
  )
  values = models.values(again["critic"], run(again["critic"]).hidden)
  inside = batch().segment_ids > 0
  np.testing.assert_allclose(
    values[inside], out.values[inside], rtol=1e-4, atol=1e-4
  )
  assert np.abs(values[inside]).max() > 0.01
  if "policy" in expected:
    logits = models.logits(again["policy"], run(again["policy"]).hidden, config)
    logps = jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch().targets[..., None], axis=-1
    )[..., 0]
    # Of a prompt no log-probabilities are asked for.
    inside = batch().action_mask
    assert inside.any()
    np.testing.assert_allclose(
      logps[inside], out.tokens.logps[inside], rtol=1e-4, atol=1e-4
    )


def names(setup):
  return [role.name for role in roles_of(setup)]


def test_roles_follow_from_the_objective_and_its_options():
  assert names(make("rejection")) == ["policy"]
  assert names(make("value")) == ["critic"]
  assert names(make("dpo")) == ["policy", "reference"]
  assert names(make("dqo")) == ["policy", "critic", "reference"]
  assert names(make("oreo")) == ["policy", "critic", "reference"]
  assert names(make("oreo", ema_decay=0.9, kl_target=0.1)) == [
    "policy", "critic", "reference", "target", "log_alpha",
  ]  # fmt: skip


def test_the_base_is_read_as_reference_or_below_adapters():
  assert not needs_base(make("rejection"))
  assert needs_base(make("rejection", lora=True))
  assert not needs_base(make("value"))
  # Of a policy that is not trained there is nothing to share but the base.
  assert needs_base(make("value", critic="shared"))
  assert needs_base(make("value", critic="lora"))
  assert needs_base(make("dpo"))


def test_each_network_has_its_own_architecture():
  configs = full_configs(make("oreo", lora=True, critic="separate"))
  assert configs["policy"].lora_rank == 2
  assert configs["critic"] == configs["reference"] == tiny.MODEL
  # A head on a trunk with adapters is a network with adapters.
  shared = full_configs(make("oreo", lora=True, critic="shared"))
  assert shared["critic"] == shared["policy"]
  assert full_configs(make("value", lora=True))["critic"] == tiny.MODEL


@pytest.mark.parametrize(
  "changes, advice",
  [
    ({"reads": ()}, "add 'reference' to `reads`"),
    ({"trains": ("policy",)}, "add 'critic' to `trains`"),
    ({"trains": ("critic",)}, "add 'policy' to `trains`"),
  ],
)
def test_a_loss_that_reads_an_undeclared_role_says_what_to_declare(
  changes, advice
):
  objective = dataclasses.replace(OBJECTIVES["oreo"], **changes)
  setup = dataclasses.replace(make("oreo"), objective=objective)

  def loss(base):
    state = init_state(jax.random.key(0), setup, base)
    rows, totals = objective.prepare(state.params, base, batch(), setup)
    out = forward(state.params, state.averages, base, rows, setup)
    return objective.loss(state.params, out, rows, totals, setup)

  with pytest.raises(ValueError, match=advice):
    jax.eval_shape(loss, tiny.draw_params())


def test_a_base_that_is_needed_must_be_given():
  setup = make("oreo", critic="lora")
  state = init_state(jax.random.key(0), setup, tiny.draw_params())
  with pytest.raises(ValueError, match="critic stands on the frozen base"):
    full_params(state.params, None, setup)
  plain = make("oreo")
  with pytest.raises(ValueError, match="reads a reference"):
    forward(
      state.params | {"critic": tiny.draw_params(head="value")},
      None,
      None,
      batch(),
      plain,
    )


def test_a_critic_to_go_on_with_needs_weights_of_its_own():
  critic = tiny.draw_params(head="value")
  for kind in ("lora", "shared"):
    with pytest.raises(ValueError, match="critic.kind=separate"):
      init_state(
        jax.random.key(0), make(critic=kind), tiny.draw_params(), critic
      )
  state = init_state(jax.random.key(0), make(), tiny.draw_params(), critic)
  tiny.assert_trees_close(state.params["critic"], critic, rtol=0, atol=0)


def test_an_objective_of_ones_own_is_an_object_and_nothing_else():
  def margin_loss(params, out, rows, totals, setup):
    del params, setup
    gap = jnp.where(rows.action_mask, out.ref_logps - out.policy.logps, 0.0)
    loss = jnp.sum(jax.nn.relu(gap)) / totals
    return loss, {"policy/margin": loss}

  objective = Objective(
    name="margin",
    label="margin",
    trains=("policy",),
    reads=("reference",),
    loss=margin_loss,
    prepare=lambda params, ref, batch, setup: Rows(
      batch, jnp.maximum(jnp.sum(batch.action_mask), 1).astype(jnp.float32)
    ),
    sequences=lambda trajectories, tokenize, config: tokenize(trajectories),
  )
  config = Config(model=tiny.MODEL, train=TrainConfig(batch_size=ROWS))
  setup = make_setup(config, objective, 4)
  assert names(setup) == ["policy", "reference"]
  base = tiny.draw_params()
  state = init_state(jax.random.key(0), setup, base)
  _, metrics = jax.eval_shape(
    functools.partial(train_step, setup=setup),
    state,
    base,
    jax.tree.map(jnp.asarray, batch()),
  )
  assert {"loss", "policy/margin", "grad_norm/policy"} < set(metrics)
