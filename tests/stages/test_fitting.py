"""Held-out figures of a value network, against a fresh forward."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import models, scoring
from oreo_jax.analysis.values import value_aucs
from oreo_jax.config import (
  Config,
  CriticConfig,
  DataConfig,
  ModelConfig,
  TrainConfig,
)
from oreo_jax.stages import fitting
from oreo_jax.stages.fitting import held_out_measure
from oreo_jax.stages.workspace import Workspace
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


def test_a_stored_reference_is_chunked_as_the_stage_says(tmp_path, monkeypatch):
  class Stored(Exception):
    pass

  def store(*unused_args, chunk_size, vocab_chunk, **unused):
    assert (chunk_size, vocab_chunk) == (32, 64)
    raise Stored

  monkeypatch.setattr(scoring, "store_reference", store)
  config = Config(
    model=dataclasses.replace(tiny.MODEL, vocab_size=0),
    data=DataConfig(tokenizer="byte", row_length=16),
    train=TrainConfig(
      reference="stored", kl="k3", loss_chunk=32, loss_vocab_chunk=64
    ),
  )
  workspace = Workspace(config, tmp_path)
  with pytest.raises(Stored):
    fitting.fit(workspace, OBJECTIVES["oreo"], [], tiny.draw_params)


@pytest.mark.slow
def test_a_stage_holds_the_reference_as_it_is_told(tmp_path):
  def first_row(name, **train):
    config = Config(
      model=ModelConfig(
        embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
      ),
      critic=CriticConfig(kind="shared"),
      data=DataConfig(tokenizer="byte", row_length=16),
      train=TrainConfig(
        batch_size=8, max_steps=1, log_every=1, measure_every=0, **train
      ),
    )
    workspace = Workspace(config, tmp_path / name)
    fitting.fit(
      workspace,
      OBJECTIVES["oreo"],
      tiny.draw_sequences(24),
      workspace.initial_policy,
    )
    policy = np.asarray(
      workspace.initial_policy()["layers"]["q"]["kernel"], np.float32
    )
    metrics = (tmp_path / name / "oreo" / "metrics.jsonl").read_text()
    return json.loads(metrics.splitlines()[0]), policy

  exact, policy = first_row("exact")
  rounded, same = first_row("rounded", reference_dtype="bfloat16")
  np.testing.assert_array_equal(policy, same)
  # The policy starts as it is, so that rounding shows as a KL from the start.
  assert exact["policy/kl"] == pytest.approx(0.0, abs=1e-7)
  assert 1e-7 < rounded["policy/kl"] < 1e-3
  assert rounded["policy/entropy"] == exact["policy/entropy"]
  waiting, _ = first_row("waiting", offload=("moments", "reference"))
  for name in ("loss", "policy/kl", "grad_norm/policy", "grad_norm/critic"):
    assert waiting[name] == exact[name]
