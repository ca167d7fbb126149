"""Every option of an objective reaches the loss, as the oracle says.

The networks' own log-probabilities and values are given to the NumPy oracles
together with the option; the loss of the objective must be theirs, and another
one than without the option.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import dqo as dqo_oracle
from oracles import logprobs as logprobs_oracle
from oracles import oreo as oreo_oracle
from oracles import preference as preference_oracle
from oracles import supervised as supervised_oracle
from oracles import tiny

from oreo_jax import models
from oreo_jax.config import Config, SftConfig, TrainConfig
from oreo_jax.data import make_loader
from oreo_jax.sharding import shard_batch
from oreo_jax.train import (
  OBJECTIVES,
  init_state,
  make_setup,
  make_train_step,
  state_shardings,
)
from oreo_jax.train.forward import forward
from oreo_jax.train.roles import optimizers

BETA, ALPHA = 0.3, 0.1
ROWS, SLOTS, SEGMENTS = 8, 16, 8


def make(objective, **changes):
  stage = {"batch_size": ROWS, "warmup": 0.0, "schedule": "constant"}
  config = Config(model=dataclasses.replace(tiny.MODEL))
  if objective == "sft":
    config.sft = SftConfig(**stage | changes)
  else:
    stage |= {"objective": objective, "beta": BETA, "alpha": ALPHA}
    config.train = TrainConfig(**stage | changes)
  config.validate()
  return make_setup(config, OBJECTIVES[objective], 4, SEGMENTS)


@functools.cache
def base():
  return tiny.draw_params()


@functools.cache
def batch_of(objective):
  sequences = tiny.draw_sequences(20, decisions="step")
  if objective == "dpo":
    sequences = list(zip(sequences[1::2], sequences[::2], strict=True))
  loader = make_loader(
    sequences, batch_size=ROWS, row_length=SLOTS, shuffle=False
  )
  batch = OBJECTIVES[objective].batch(loader, 0)
  return jax.tree.map(jnp.asarray, batch)


def nudge(tree, seed):
  """Moves weights away from the reference, where most terms vanish."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + jnp.float32(0.15) * rng.standard_normal(x.shape, np.float32),
    tree,
  )


@functools.cache
def networks():
  """Parameters and averages of a stage under way."""
  start = init_state(
    jax.random.key(0), make("oreo", ema_decay=0.9, kl_target=0.1), base()
  )
  params = {
    "policy": nudge(start.params["policy"], 1),
    "critic": nudge(start.params["critic"], 2),
    "log_alpha": jnp.log(jnp.float32(2.0)),  # not where it started
  }
  return params, {"target": nudge(start.params["policy"], 3)}


def state_of(setup):
  """The part of `networks()` that a stage has."""
  params, averages = networks()
  state = init_state(jax.random.key(0), setup, base())
  return state._replace(
    params={name: params[name] for name in state.params},
    averages={name: averages[name] for name in state.averages},
  )


@functools.cache
def outputs_of(objective, kl, has_average):
  """One forward pass for all the tests that read the same of it."""
  averaged = {"ema_decay": 0.9} if has_average else {}
  changes = {} if objective == "sft" else {"kl": kl, **averaged}
  setup = make(objective, **changes)
  state, batch = state_of(setup), batch_of(objective)
  rows = getattr(batch, "rows", batch)
  run = jax.jit(functools.partial(forward, setup=setup))
  return run(state.params, state.averages, base(), rows)


def loss_of(objective, **changes):
  """The loss of a batch, made as the training step makes it."""
  setup = make(objective, **changes)
  state, batch = state_of(setup), batch_of(objective)
  rows, totals = setup.objective.prepare(state.params, base(), batch, setup)
  out = outputs_of(
    objective, changes.get("kl", "reverse"), bool(changes.get("ema_decay"))
  )
  loss, _ = setup.objective.loss(state.params, out, rows, totals, setup)
  return float(loss)


@functools.cache
def arrays_of(objective):
  """(what the oracles take, segment ids), float64."""
  out = outputs_of(objective, "reverse", False)
  batch = batch_of(objective)
  rows = getattr(batch, "rows", batch)
  policy_free = out.tokens is None
  logps = jnp.zeros(rows.tokens.shape) if policy_free else out.tokens.logps
  ref = None if policy_free else out.tokens.ref_logps
  values = jnp.zeros(logps.shape) if out.values is None else out.values
  arrays = (
    logps, jnp.zeros(logps.shape) if ref is None else ref, values,
    rows.rewards, rows.action_mask, rows.decision_mask,
  )  # fmt: skip
  return [np.asarray(x, np.float64) for x in arrays], np.asarray(
    rows.segment_ids
  )


@functools.cache
def exact(objective):
  """The oracle's own log-probabilities, KL included, from hidden states."""
  batch = batch_of(objective)
  policy = networks()[0]["policy"]

  def hidden(params):
    return np.asarray(
      models.apply(
        params,
        batch.tokens,
        tiny.MODEL,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
      ).hidden
    )

  return logprobs_oracle.token_logprobs(
    hidden(policy),
    np.asarray(models.head_matrix(policy, tiny.MODEL)),
    np.asarray(batch.targets),
    hidden(base()),
    np.asarray(models.head_matrix(base(), tiny.MODEL)),
  )


def expected_oreo(**options):
  arrays, segment_ids = arrays_of("oreo")
  options = {
    "beta": BETA,
    "alpha": ALPHA,
    "kl": exact("oreo")["kl"],
    "segment_ids": segment_ids,
    **options,
  }
  return oreo_oracle.oreo_loss(*arrays, **options)["total"]


def expected_value(**options):
  arrays, segment_ids = arrays_of("value")
  return oreo_oracle.value_loss(
    *arrays, **{"beta": BETA, "segment_ids": segment_ids, **options}
  )


def expected_dqo(*, kl="kl", alpha=ALPHA, lam=1.0, token_mean=False, **options):
  arrays, segment_ids = arrays_of("dqo")
  losses = dqo_oracle.dqo_loss(
    *arrays,
    **{"beta": BETA, **options},
    lam=lam,
    weight_cap=math.e,
    token_mean=token_mean,
    segment_ids=segment_ids,
  )
  divergence = (
    oreo_oracle.masked_k3(*arrays) if kl == "k3" else exact("dqo")[kl]
  )
  penalty = oreo_oracle.kl_loss(
    *arrays, kl=divergence, token_mean=token_mean, segment_ids=segment_ids
  )
  return sum(losses) + alpha * penalty


def ratios(objective):
  """Log-ratio of every answer, by row and segment."""
  arrays, segment_ids = arrays_of(objective)
  return preference_oracle.log_ratios(
    arrays[0], arrays[1], arrays[4], segment_ids
  )


def expected_dpo(*, ipo=False, beta=BETA, **options):
  answers = ratios("dpo")
  chosen = [v for (_, k), v in sorted(answers.items()) if k % 2 == 1]
  rejected = [v for (_, k), v in sorted(answers.items()) if k % 2 == 0]
  loss = preference_oracle.ipo_loss if ipo else preference_oracle.dpo_loss
  return loss(chosen, rejected, beta=beta, **options)


@functools.cache
def mismatched_ratios():
  """Log-ratios of the answers that follow another's prompt."""
  setup, rows = make("kto"), batch_of("kto").mismatched
  out = forward(networks()[0], None, base(), rows, setup).tokens
  return preference_oracle.log_ratios(
    out.logps, out.ref_logps, rows.action_mask, rows.segment_ids
  )


def expected_kto(*, beta=BETA, **options):
  (_, _, _, rewards, mask, _), segment_ids = arrays_of("kto")
  returns = preference_oracle.log_ratios(
    rewards, np.zeros_like(rewards), mask, segment_ids
  )
  answers = ratios("kto")
  z0 = preference_oracle.kto_z0(list(mismatched_ratios().values()))
  return preference_oracle.kto_loss(
    list(answers.values()),
    [returns[key] > 0.5 for key in answers],
    z0,
    beta=beta,
    **options,
  )


def expected_sft(*, on_prompts=False):
  arrays, segment_ids = arrays_of("sft")
  mask = segment_ids > 0 if on_prompts else arrays[4]
  return supervised_oracle.sft_loss(arrays[0], mask, segment_ids)


def averaged_logps():
  return np.asarray(outputs_of("oreo", "reverse", True).target_logps)


@functools.cache
def loss_without_options(objective):
  expected = ORACLES[objective]()
  np.testing.assert_allclose(loss_of(objective), expected, rtol=5e-5)
  return expected


# (objective, the option, what the oracle is told instead).
OPTIONS = [
  ("sft", {"on_prompts": True}, {"on_prompts": True}),
  ("oreo", {"beta": 0.7}, {"beta": 0.7}),
  ("oreo", {"alpha": 0.6}, {"alpha": 0.6}),
  ("oreo", {"kl": "forward"}, lambda: {"kl": exact("oreo")["forward_kl"]}),
  ("oreo", {"kl": "k3"}, {"kl": None}),
  # The learned alpha is that of the parameters: exp(log 2).
  ("oreo", {"kl_target": 0.1}, {"alpha": 2.0}),
  ("oreo", {"reduction": "token"}, {"token_mean": True}),
  ("oreo", {"clip_log": 0.05}, {"clip_log": 0.05}),
  ("oreo", {"importance_weights": True}, {"importance_cap": math.e}),
  ("oreo", {"ema_decay": 0.9}, lambda: {"target_logps": averaged_logps()}),
  ("oreo", {"hinge": 0.5}, {"hinge": 0.5}),
  ("oreo", {"single_step": True}, {"single_step": True}),
  ("oreo", {"reward_scale": 2.0}, {"reward_mul": 2.0}),
  ("oreo", {"reward_offset": -0.5}, {"reward_add": -0.5}),
  ("value", {"reduction": "token"}, {"token_mean": True}),
  ("value", {"single_step": True}, {"single_step": True}),
  ("value", {"reward_scale": 2.0}, {"reward_mul": 2.0}),
  ("value", {"reward_offset": -0.5}, {"reward_add": -0.5}),
  ("dqo", {"beta": 0.7}, {"beta": 0.7}),
  ("dqo", {"alpha": 0.6}, {"alpha": 0.6}),
  ("dqo", {"dqo_lambda": 0.4}, {"lam": 0.4}),
  ("dqo", {"kl": "forward"}, {"kl": "forward_kl"}),
  ("dqo", {"kl": "k3"}, {"kl": "k3"}),
  ("dqo", {"reduction": "token"}, {"token_mean": True}),
  ("dqo", {"reward_scale": 2.0}, {"reward_mul": 2.0}),
  ("dqo", {"reward_offset": -0.5}, {"reward_add": -0.5}),
  ("dpo", {"beta": 0.7}, {"beta": 0.7}),
  ("dpo", {"dpo_variant": "ipo"}, {"ipo": True}),
  ("dpo", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
  ("kto", {"beta": 0.7}, {"beta": 0.7}),
  ("kto", {"desirable_weight": 1.7}, {"desirable_weight": 1.7}),
  ("kto", {"undesirable_weight": 0.3}, {"undesirable_weight": 0.3}),
]

ORACLES = {
  "sft": expected_sft,
  "oreo": expected_oreo,
  "value": expected_value,
  "dqo": expected_dqo,
  "dpo": expected_dpo,
  "kto": expected_kto,
}


@pytest.mark.parametrize(
  "objective, changes, told",
  OPTIONS,
  ids=[f"{name}-{next(iter(changes))}" for name, changes, _ in OPTIONS],
)
def test_an_option_changes_the_loss_as_the_oracle_says(
  objective, changes, told
):
  told = told() if callable(told) else told
  expected = ORACLES[objective](**told)
  np.testing.assert_allclose(
    loss_of(objective, **changes), expected, rtol=5e-5, err_msg=str(changes)
  )
  without = loss_without_options(objective)
  # An option that is not wired would give this.
  assert abs(expected - without) > 1e-3 * abs(without)


def test_the_step_reports_the_loss_that_the_options_ask_for():
  changes = {
    "kl": "forward",
    "reduction": "token",
    "clip_log": 0.05,
    "importance_weights": True,
    "ema_decay": 0.9,
    "hinge": 0.5,
    "reward_scale": 2.0,
    "reward_offset": -0.5,
  }
  setup, mesh = make("oreo", **changes), tiny.mesh()
  state = state_of(setup)
  # Copies, as the step is given the state for good.
  state = jax.device_put(
    jax.tree.map(jnp.copy, state), state_shardings(setup, state, mesh)
  )
  step = make_train_step(setup, state, mesh)
  with jax.set_mesh(mesh):
    _, metrics = step(state, base(), shard_batch(batch_of("oreo"), mesh))
  expected = expected_oreo(
    kl=exact("oreo")["forward_kl"],
    token_mean=True,
    clip_log=0.05,
    importance_cap=math.e,
    target_logps=averaged_logps(),
    hinge=0.5,
    reward_mul=2.0,
    reward_add=-0.5,
  )
  np.testing.assert_allclose(metrics["loss"], expected, rtol=5e-5)


def test_each_role_has_its_own_rate():
  setup = make(
    "oreo",
    lr=0.01,
    critic_lr=0.02,
    value_head_lr=0.06,
    alpha_lr=0.3,
    kl_target=0.1,
    eps=1e-12,
    clip_norm=0.0,
  )
  state = state_of(setup)
  # The first step of Adam is the rate times the gradient's sign.
  updates = {}
  for name, optimizer in optimizers(setup).items():
    gradient = jax.tree.map(jnp.ones_like, state.params[name])
    moments = state.opt_state[name]
    updates[name], _ = optimizer.update(gradient, moments, state.params[name])
  for update, rate in (
    (updates["policy"]["embedding"], 0.01),
    (updates["critic"]["embedding"], 0.02),
    (updates["critic"]["value_head"], 0.06),
    (updates["log_alpha"], 0.3),
  ):
    np.testing.assert_allclose(update, -rate, rtol=1e-5)
