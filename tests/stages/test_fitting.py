"""Held-out figures of a value network, against a fresh forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.analysis.values import value_aucs
from oreo_jax.config import Config, DataConfig, TrainConfig
from oreo_jax.stages.fitting import held_out_measure
from oreo_jax.train import OBJECTIVES, init_state, make_setup


def test_held_out_values_are_those_before_the_last_token():
  # AUCs of a plain forward, a sequence at a time.
  sequences = tiny.draw_sequences(24, seed=8)
  # Some credit does not make an answer right.
  for wrong in sequences[::2]:
    wrong.rewards[-1] = 0.3
  config = Config(
    model=tiny.MODEL,
    data=DataConfig(row_length=16),
    train=TrainConfig(batch_size=4),
  )
  setup = make_setup(config, OBJECTIVES["oreo"], 1)
  base = tiny.draw_params()
  critic = tiny.draw_params(head="value", seed=2)
  state = init_state(jax.random.key(0), setup, base, critic)
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  base = tiny.place(base, tiny.MODEL, mesh)
  params = {
    "policy": tiny.place(state.params["policy"], tiny.MODEL, mesh),
    "critic": tiny.place(critic, tiny.MODEL, mesh, head="value"),
  }
  with jax.set_mesh(mesh):
    measure = held_out_measure(sequences, setup, config, mesh)
    figures = measure(state._replace(params=params), base)
    spoilt = {**params, "critic": jax.tree.map(jnp.log, params["critic"])}
    with pytest.raises(FloatingPointError, match="held-out answer"):
      measure(state._replace(params=spoilt), base)
  tokens = np.zeros((24, 9), np.int32)
  for row, sequence in enumerate(sequences):
    tokens[row, : len(sequence.tokens)] = sequence.tokens
  hidden = models.apply(critic, jnp.asarray(tokens), tiny.MODEL).hidden
  values = np.asarray(models.values(critic, hidden))
  last = [len(sequence.tokens) - 2 for sequence in sequences]
  want = value_aucs(
    values[np.arange(24), last],
    np.array([s.rewards.sum() > 0.5 for s in sequences]),
    [s.problem for s in sequences],
  )
  assert figures == pytest.approx(want)
  assert 0 < figures["heldout/pooled_auc"] < 1
