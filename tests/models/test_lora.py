"""Adapters: added, split off, merged, and in a sharded and bfloat16 model."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from oreo_jax.models import (
  abstract_params,
  add_adapters,
  apply,
  join_adapters,
  load_hf,
  logits,
  merge_adapters,
  preset,
  save_adapter,
  save_hf,
  split_adapters,
)

PLAIN = preset("tiny-qwen2")
ALL = ("q", "k", "v", "o", "gate", "up", "down")
ADAPTED = dataclasses.replace(
  PLAIN, lora_rank=3, lora_alpha=6.0, lora_targets=ALL
)
TOKENS = np.arange(12, dtype=np.int32).reshape(1, 12)


def make(config, head="lm", seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
    abstract_params(config, head=head),
  )


@functools.partial(jax.jit, static_argnames="config")
def run(params, config):
  return logits(params, apply(params, TOKENS, config).hidden, config)


@functools.cache
def adapted():
  """A base with adapters as training would leave them: B no longer zero."""
  return make(ADAPTED)


def test_fresh_adapters_change_nothing_and_share_the_base():
  base = make(PLAIN)
  params = add_adapters(jax.random.key(0), base, ADAPTED)
  np.testing.assert_array_equal(run(params, ADAPTED), run(base, PLAIN))
  kernel = params["layers"]["q"]["kernel"]
  assert kernel is base["layers"]["q"]["kernel"]
  assert "lora_a" not in base["layers"]["q"]
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
  wants = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(ADAPTED))
  assert shapes == wants
  a = params["layers"]["gate"]["lora_a"]
  assert float(a.std()) == pytest.approx(PLAIN.embed_dim**-0.5, rel=0.2)
  # No two adapters start alike.
  assert not np.allclose(
    params["layers"]["gate"]["lora_a"], params["layers"]["up"]["lora_a"]
  )


def test_adapters_need_a_rank_and_targets():
  with pytest.raises(ValueError, match="lora_rank and lora_targets must be"):
    add_adapters(jax.random.key(0), make(PLAIN), PLAIN)


def test_split_and_join_are_inverse():
  params = adapted()
  base, trained = split_adapters(params)
  assert jax.tree.structure(base) == jax.tree.structure(make(PLAIN))
  assert set(trained) == {"layers"}
  assert {k for group in trained["layers"].values() for k in group} == {
    "lora_a",
    "lora_b",
  }
  again = join_adapters(base, trained)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(lambda a, b: np.testing.assert_(a is b), again, params)


def test_a_value_network_joins_on_the_base_of_a_policy():
  config = dataclasses.replace(ADAPTED, tie_embeddings=False)
  policy = make(dataclasses.replace(PLAIN, tie_embeddings=False))
  _, trained = split_adapters(make(config, head="value"))
  assert set(trained) == {"layers", "value_head"}
  critic = join_adapters(policy, trained)
  assert "head" not in critic and "head" in policy
  assert critic["embedding"] is policy["embedding"]
  apply(critic, TOKENS, config)


def test_merged_equals_applied():
  params = adapted()
  merged, config = merge_adapters(params, ADAPTED)
  assert config == PLAIN
  assert jax.tree.structure(merged) == jax.tree.structure(make(PLAIN))
  want = run(params, ADAPTED)
  np.testing.assert_allclose(
    run(merged, config), want, atol=1e-5 * float(want.std())
  )


def test_only_some_projections_carry_adapters():
  config = dataclasses.replace(ADAPTED, lora_targets=("v", "o"))
  params = add_adapters(jax.random.key(0), make(PLAIN), config)
  carriers = {k for k, group in params["layers"].items() if "lora_a" in group}
  assert carriers == {"v", "o"}
  run(params, config)


def test_adapters_of_a_bfloat16_base_are_float32():
  config = dataclasses.replace(
    ADAPTED, dtype="bfloat16", param_dtype="bfloat16"
  )
  base = make(dataclasses.replace(config, lora_rank=0, lora_targets=()))
  params = add_adapters(jax.random.key(0), base, config)
  assert params["layers"]["q"]["lora_a"].dtype == jnp.float32
  merged, _ = merge_adapters(params, config)
  assert merged["layers"]["q"]["kernel"].dtype == jnp.bfloat16
  assert run(params, config).dtype == jnp.float32


def test_export_merges_adapters(tmp_path):
  params = adapted()
  save_hf(tmp_path / "out", params, ADAPTED)
  again, config = load_hf(tmp_path / "out")
  want = run(params, ADAPTED)
  np.testing.assert_allclose(
    run(again, config), want, atol=1e-5 * float(want.std())
  )


def test_adapter_directory_holds_what_peft_reads(tmp_path):
  config = dataclasses.replace(ADAPTED, lora_targets=("q", "down"))
  params = make(config, head="value")
  save_adapter(tmp_path / "out", params, config, base="some/model")
  settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
  assert settings["target_modules"] == ["down_proj", "q_proj"]
  assert (settings["r"], settings["lora_alpha"]) == (3, 6.0)
  assert settings["base_model_name_or_path"] == "some/model"
  tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
  assert len(tensors) == 2 * 2 * PLAIN.num_layers + 1
  name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
  a, b = tensors[name.format("A")], tensors[name.format("B")]
  group = params["layers"]["q"]
  np.testing.assert_array_equal(a, group["lora_a"][1].T)
  np.testing.assert_array_equal(b, group["lora_b"][1].reshape(3, -1).T)
  np.testing.assert_array_equal(
    tensors["base_model.model.score.weight"], params["value_head"].T
  )
  with pytest.raises(ValueError, match="there are no adapters to save"):
    save_adapter(tmp_path / "none", make(PLAIN), PLAIN)


def test_only_the_last_layers_are_trained():
  params, all_layers = adapted(), ADAPTED
  last = dataclasses.replace(ADAPTED, lora_layers=1)
  assert PLAIN.num_layers == 2
  base, trained = split_adapters(params)

  @functools.partial(jax.jit, static_argnames="config")
  def gradient(trained, config):
    def loss(trained):
      hidden = apply(join_adapters(base, trained), TOKENS, config).hidden
      return jnp.sum(hidden**2)

    return jax.value_and_grad(loss)(trained)

  want_loss, want = gradient(trained, all_layers)
  loss, found = gradient(trained, last)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  for got, whole in zip(
    jax.tree.leaves(found), jax.tree.leaves(want), strict=True
  ):
    assert np.abs(whole[0]).max() > 0
    assert not np.any(got[0])
    np.testing.assert_allclose(got[1], whole[1], rtol=1e-4, atol=1e-5)


def test_the_frozen_layers_keep_nothing_for_a_backward_pass():
  base, trained = split_adapters(adapted())

  def residuals(config):
    def hidden(trained):
      return apply(join_adapters(base, trained), TOKENS, config).hidden

    return sum(
      leaf.size for leaf in jax.tree.leaves(jax.vjp(hidden, trained)[1])
    )

  last = dataclasses.replace(ADAPTED, lora_layers=1)
  assert residuals(last) < 0.75 * residuals(ADAPTED)


def test_more_adapted_layers_than_layers_is_an_error():
  config = dataclasses.replace(ADAPTED, lora_layers=3)
  with pytest.raises(ValueError, match="--config.lora.last_layers=0"):
    add_adapters(jax.random.key(0), make(PLAIN), config)
