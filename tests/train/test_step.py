"""The training step: what must not change it, and what it must not touch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax.config import (
  Config,
  ConfigError,
  CriticConfig,
  LoraConfig,
  SftConfig,
  TrainConfig,
)
from oreo_jax.data import make_loader
from oreo_jax.sharding import shard_batch
from oreo_jax.train import (
  OBJECTIVES,
  full_params,
  init_state,
  make_setup,
  make_train_step,
  plain_models,
  state_shardings,
  train_step,
)
from oreo_jax.train.forward import forward
from oreo_jax.train.roles import learning_rates, needs_base

# A large epsilon makes Adam's step smooth in the gradient, so that equal
# parameters mean equal gradients; clipping stays out of it.
SMOOTH = {"lr": 0.1, "eps": 1.0, "clip_norm": 0.0, "warmup": 0.0}
ROWS, SLOTS = 16, 16


def make(objective, *, policy_lora=False, critic="separate", **changes):
  """Returns the setup of a stage."""
  stage = {**SMOOTH, "batch_size": ROWS, "schedule": "constant", **changes}
  config = Config(
    model=dataclasses.replace(tiny.MODEL),
    critic=CriticConfig(kind=critic),
    lora=LoraConfig(policy=policy_lora, rank=2, alpha=4.0),
  )
  if objective == "sft":
    config.sft = SftConfig(**stage)
  else:
    stage = {"critic_lr": 0.1, "beta": 0.3, "alpha": 0.1, **stage}
    config.train = TrainConfig(objective=objective, **stage)
  config.validate()
  return make_setup(config, OBJECTIVES[objective], 8, max_segments=8)


@functools.cache
def batch_of(objective, rows=ROWS, pack=True, seed=0):
  sequences = tiny.draw_sequences(40, seed=seed, decisions="step")
  if objective == "dpo":
    sequences = list(zip(sequences[1:28:2], sequences[:28:2], strict=True))
  loader = make_loader(
    sequences, batch_size=rows, row_length=SLOTS, pack=pack, shuffle=False
  )
  assert loader.num_steps == 1
  return OBJECTIVES[objective].batch(loader, 0)


@functools.cache
def base():
  return tiny.draw_params()


def reference(setup, params):
  return params if needs_base(setup) else None


def at_reference(setup, mesh):
  """Returns the state that a stage starts from, and the reference."""
  ref = tiny.place(base(), tiny.MODEL, mesh)
  state = init_state(KEY, setup, ref)
  return jax.device_put(state, state_shardings(setup, state, mesh)), ref


def start(setup, mesh):
  """Returns a state away from the reference, with a critic that says something.

  At the reference itself every log-ratio is 0 and most terms vanish.
  """
  state, ref = at_reference(setup, mesh)
  rng = np.random.default_rng(5)

  def nudge(x):
    moved = np.asarray(x) + 0.1 * rng.standard_normal(x.shape)
    return jax.device_put(moved.astype(x.dtype), x.sharding)

  params = {
    name: jax.tree.map(nudge, state.params[name])
    for name in sorted(state.params)
    if name != "log_alpha"
  }
  return state._replace(params=state.params | params), ref


@functools.cache
def compiled(setup_items, mesh_items):
  """One compilation for all the tests that share a setup and a mesh."""
  setup, mesh = make(**dict(setup_items)), tiny.mesh(**dict(mesh_items))
  state = jax.eval_shape(lambda p: init_state(KEY, setup, p), base())
  return make_train_step(setup, state, mesh)


KEY = jax.random.key(1)
SPLIT = {"data": 2, "fsdp": 2, "tensor": 2}


def run(setup, mesh=None, *, batches=None, steps=2, state=None):
  """Runs steps; returns the last state, the metrics of each, and the ref."""
  mesh = mesh or {}
  built, devices = make(**setup), tiny.mesh(**mesh)
  step = compiled(tuple(setup.items()), tuple(mesh.items()))
  state = state or start
  state, ref = state(built, devices)
  batches = batches or [batch_of(setup["objective"])] * steps
  metrics = []
  with jax.set_mesh(devices):
    for batch in batches:
      state, figures = step(
        state, reference(built, ref), shard_batch(batch, devices)
      )
      metrics.append(jax.device_get(figures))
  return state, metrics, ref


@functools.cache
def plain_run(objective):
  state, metrics, _ = run({"objective": objective})
  return jax.device_get(state), metrics


def assert_same_run(got, want):
  (state, metrics), (want_state, want_metrics) = got, want
  tiny.assert_trees_close(metrics, want_metrics, rtol=2e-5, atol=1e-5)
  tiny.assert_trees_close(state.params, want_state.params, rtol=0, atol=1e-5)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  "objective, mesh, parts",
  [
    ("oreo", SPLIT, 2),
    slow("oreo", {}, 4),
    slow("oreo", {"data": 8}, 1),
    slow("oreo", {"fsdp": 4}, 1),
    slow("sft", SPLIT, 2),
    slow("dqo", SPLIT, 2),
    slow("dpo", SPLIT, 2),
    slow("kto", SPLIT, 2),
    slow("rejection", {"data": 8}, 2),
  ],
)
def test_accumulation_and_devices_change_nothing(objective, mesh, parts):
  setup = {"objective": objective, "grad_accum": parts}
  state, metrics, _ = run(setup, mesh)
  assert_same_run((state, metrics), plain_run(objective))
  # Two steps of a policy that moves: not a comparison of zeros.
  assert metrics[0]["grad_norm/policy"] > 1e-3
  assert metrics[0]["loss"] != metrics[1]["loss"]


def test_parts_of_the_batch_hold_different_numbers_of_sequences():
  # What the test above is about: a mean of means would not do.
  rows = batch_of("oreo").segment_ids.max(axis=1)
  assert len(set(rows.tolist())) > 1 and rows.min() == 0


def test_order_of_rows_changes_nothing():
  batch = batch_of("oreo")
  order = np.random.default_rng(0).permutation(ROWS)
  mixed = jax.tree.map(lambda x: x[order], batch)
  state, metrics, _ = run({"objective": "oreo"}, batches=[mixed] * 2)
  assert_same_run((state, metrics), plain_run("oreo"))


def test_packing_changes_nothing():
  few = tiny.draw_sequences(ROWS, seed=3, decisions="step")
  batches = [
    make_loader(
      few, batch_size=ROWS, row_length=SLOTS, pack=pack, shuffle=pack
    ).batch(0)
    for pack in (True, False)
  ]
  packed, plain = (x.segment_ids.max(axis=1) for x in batches)
  assert packed.max() > 1 and packed.min() == 0 and plain.max() == 1
  runs = [
    run({"objective": "oreo"}, batches=[batch] * 2)[:2] for batch in batches
  ]
  assert_same_run(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "oreo"])
def test_no_jit_gives_the_same(objective):
  setup = make(objective)
  state, ref = start(setup, tiny.mesh())
  batch = jax.tree.map(jnp.asarray, batch_of(objective))
  state, metrics = train_step(state, reference(setup, ref), batch, setup=setup)
  want_state, want_metrics, _ = run({"objective": objective}, steps=1)
  assert_same_run((state, [metrics]), (want_state, want_metrics))


def test_state_is_donated_and_reference_is_not():
  setup, mesh = make("oreo"), tiny.mesh()
  step = compiled((("objective", "oreo"),), ())
  state, ref = start(setup, mesh)
  before = jax.device_get(ref)
  old = state
  with jax.set_mesh(mesh):
    for _ in range(3):
      state, _ = step(state, ref, shard_batch(batch_of("oreo"), mesh))
  assert all(x.is_deleted() for x in jax.tree.leaves(old))
  assert not any(x.is_deleted() for x in jax.tree.leaves(ref))
  tiny.assert_trees_close(ref, before, rtol=0, atol=0)
  # The base that the state was made from is not the donated one either.
  assert not any(x.is_deleted() for x in jax.tree.leaves(base()))


def test_more_arrays_a_token_pass_through_micro_batches():
  setup = make("kto", grad_accum=2)
  batch = jax.tree.map(jnp.asarray, batch_of("kto"))
  extras = {"behaviour_logps": jnp.zeros(batch.rows.tokens.shape)}
  seen = []

  def loss(params, out, rows, totals, setup):
    seen.append({k: v.shape for k, v in rows.extras.items()})
    return OBJECTIVES["kto"].loss(params, out, rows, totals, setup)

  setup = dataclasses.replace(
    setup, objective=dataclasses.replace(setup.objective, loss=loss)
  )
  state = jax.eval_shape(lambda p: init_state(KEY, setup, p), base())
  batch = batch._replace(rows=batch.rows._replace(extras=extras))
  jax.eval_shape(
    functools.partial(train_step, setup=setup), state, base(), batch
  )
  assert seen and all(
    shapes == {"behaviour_logps": (ROWS // 2, SLOTS)} for shapes in seen
  )


def test_step_is_traced_once(monkeypatch):
  traces = []

  def counted(*args):
    traces.append(args)
    return forward(*args)

  monkeypatch.setattr("oreo_jax.train.step.forward", counted)
  compiled.cache_clear()
  run({"objective": "sft"}, steps=3)
  run({"objective": "sft"}, steps=1)
  assert len(traces) == 1


def test_micro_batch_must_divide_over_the_mesh():
  setup = make("oreo", grad_accum=4)
  state = jax.eval_shape(lambda p: init_state(KEY, setup, p), base())
  with pytest.raises(ConfigError, match="micro-batch of 4 rows.*8 shards"):
    make_train_step(setup, state, tiny.mesh(data=8))


LEARNS = {
  "objective": "oreo",
  "critic_warmup": 0.25,  # of 8 steps: two
  "ema_decay": 0.9,
  "kl_target": 0.05,
  "alpha_lr": 0.1,
}


def host_states(setup, count, first):
  """The state before and after each of `count` steps, on the host."""
  built, mesh = make(**setup), tiny.mesh()
  step = compiled(tuple(setup.items()), ())
  state, ref = first(built, mesh)
  states, metrics = [jax.device_get(state)], []
  for _ in range(count):
    batch = shard_batch(batch_of(setup["objective"]), mesh)
    with jax.set_mesh(mesh):
      state, figures = step(state, reference(built, ref), batch)
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(figures))
  return states, metrics


def differs(a, b):
  """Names of the leaves that are not the same."""
  a, b = (dict(jax.tree_util.tree_leaves_with_path(x)) for x in (a, b))
  return {jax.tree_util.keystr(k) for k in a if not np.array_equal(a[k], b[k])}


def test_critic_warms_up_with_the_policy_frozen():
  states, metrics = host_states(LEARNS, 4, start)
  for old, new in zip(states[:2], states[1:3], strict=True):
    assert not differs(old.params["policy"], new.params["policy"])
    assert not differs(old.opt_state["policy"], new.opt_state["policy"])
    assert differs(old.params["critic"], new.params["critic"])
  assert differs(states[2].params["policy"], states[3].params["policy"])
  assert states[4].step == 4
  # The policy's own schedule starts with it; the rates are those applied.
  count = states[4].opt_state["policy"][1][0].count
  assert count == 2
  assert [m["lr/policy"] > 0 for m in metrics] == [False, False, True, True]
  losses = [figures["value/loss"] for figures in metrics]
  assert losses[2] < losses[0]


def test_schedules_end_with_the_stage():
  # Of 8 steps the policy moves in 6: its cosine ends at the same step.
  changes = {"schedule": "cosine", "critic_warmup": 0.25}
  setup = make("oreo", **changes)
  rates = [learning_rates(setup, jnp.int32(step)) for step in range(9)]
  progress = np.clip((np.arange(9) - 2) / 6, 0, 1)
  want = np.where(np.arange(9) < 2, 0, 0.1 * (1 + np.cos(np.pi * progress)) / 2)
  np.testing.assert_allclose([r["lr/policy"] for r in rates], want, atol=1e-7)
  assert rates[0]["lr/critic"] == np.float32(0.1)
  assert rates[8]["lr/critic"] < 1e-7


def test_ema_follows_the_policy():
  states, _ = host_states(LEARNS, 4, start)
  for old, new in zip(states[:-1], states[1:], strict=True):
    want = jax.tree.map(
      lambda e, p: 0.9 * e + 0.1 * p,
      old.averages["target"],
      new.params["policy"],
    )
    tiny.assert_trees_close(new.averages["target"], want, rtol=1e-6, atol=1e-7)


def test_learned_alpha_moves_towards_the_target():
  target = LEARNS["kl_target"]
  _, above = host_states(LEARNS, 4, start)
  assert above[2]["policy/kl"] > target
  assert above[3]["policy/alpha"] > above[2]["policy/alpha"]
  _, below = host_states(LEARNS, 4, at_reference)
  assert below[2]["policy/kl"] < target
  assert below[3]["policy/alpha"] < below[2]["policy/alpha"]
  # Two steps of warm-up: the KL cannot move yet, so neither does alpha.
  for figures in (*above[:3], *below[:3]):
    np.testing.assert_allclose(figures["policy/alpha"], 0.1, rtol=1e-5)


def test_adapters_alone_are_trained():
  setup = {"objective": "oreo", "policy_lora": True, "critic": "lora"}
  states, metrics = host_states(setup, 3, at_reference)
  assert all(np.isfinite(list(m.values())).all() for m in metrics)
  for name in ("policy", "critic"):
    paths = differs(states[0].params[name], states[3].params[name])
    ends = {path.split("[")[-1] for path in paths}
    extra = {"'value_head']"} if name == "critic" else set()
    assert ends == {"'lora_a']", "'lora_b']"} | extra
    assert len(paths) == len(jax.tree.leaves(states[0].params[name]))
  assert metrics[2]["value/loss"] < metrics[0]["value/loss"]
  # The base below the adapters is the reference's, not a copy.
  built = make(**setup)
  full = full_params(states[3].params, base(), built)
  for role in ("policy", "critic"):
    kernel = full[role]["layers"]["q"]["kernel"]
    assert kernel is base()["layers"]["q"]["kernel"]
  plain, config = plain_models(full, built)
  assert config == tiny.MODEL
  q = full["policy"]["layers"]["q"]
  update = np.einsum("ldr,lrnh->ldnh", q["lora_a"], q["lora_b"]) * (4.0 / 2)
  np.testing.assert_allclose(
    plain["policy"]["layers"]["q"]["kernel"],
    np.asarray(q["kernel"]) + update,
    rtol=1e-5,
    atol=1e-6,
  )
  assert set(plain["critic"]) == {
    "embedding",
    "final_norm",
    "layers",
    "value_head",
  }


def test_shared_critic_is_a_head_on_the_policy():
  setup = {"objective": "oreo", "critic": "shared"}
  states, metrics = host_states(setup, 3, at_reference)
  assert all(np.isfinite(list(m.values())).all() for m in metrics)
  assert set(states[0].params["critic"]) == {"value_head"}
  assert not np.any(states[0].params["critic"]["value_head"])
  assert differs(states[0].params["critic"], states[3].params["critic"])
  assert metrics[2]["value/loss"] < metrics[0]["value/loss"]
  full = full_params(states[3].params, base(), make(**setup))
  policy = states[3].params["policy"]
  assert full["critic"]["embedding"] is policy["embedding"]


def test_critic_starts_as_the_reference_with_a_head_of_zeros():
  state, ref = at_reference(make("oreo"), tiny.mesh())
  critic = state.params["critic"]
  assert not np.any(critic["value_head"])
  assert not differs(critic["layers"], ref["layers"])
  assert not differs(state.params["policy"], ref)


def test_at_the_reference_the_first_figures_are_known():
  # Log-ratios and values are 0 there: both losses are the mean of R squared.
  _, metrics = host_states({"objective": "oreo"}, 1, at_reference)
  sequences = tiny.draw_sequences(40, decisions="step")
  square = np.mean([s.rewards.sum() ** 2 for s in sequences])
  for name in ("value/loss", "policy/loss"):
    np.testing.assert_allclose(metrics[0][name], square, rtol=1e-5)
  np.testing.assert_allclose(metrics[0]["policy/kl"], 0.0, atol=1e-5)
  np.testing.assert_allclose(metrics[0]["reward/mean"], square, rtol=1e-5)
