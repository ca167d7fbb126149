"""Eight-bit weights and caches: exact where they can be, else within bounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from oreo_jax import models
from oreo_jax.config import ConfigError, SamplingConfig
from oreo_jax.decode import GREEDY, generate
from oreo_jax.decode.layout import make_layout
from oreo_jax.models.quantize import quantize, quantize_weights

PROMPTS = [[3], [1, 5, 2, 9, 4], [7, 7], [2, 8, 1]]


@pytest.mark.parametrize("axes", [-1, 0, (0, 2)])
def test_no_entry_is_off_by_more_than_half_a_step(axes):
  x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype("f4")
  x[1] *= 1e-3
  x[2, 4] = 0.0
  n, scale = map(np.asarray, quantize(jnp.asarray(x), axes))
  step = np.abs(x.astype("f8")).max(axis=axes) / 127
  step[step == 0] = 1.0
  assert n.dtype == np.int8 and np.abs(n).max() == 127
  np.testing.assert_allclose(scale, step, rtol=1e-6)
  wide = np.expand_dims(scale.astype("f8"), axes)
  assert np.all(np.abs(n * wide - x) <= wide * 0.5001)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_weights_say_what_their_floats_say(tied):
  config = dataclasses.replace(tiny.MODEL, tie_embeddings=tied)
  int8 = dataclasses.replace(config, weight_dtype="int8")
  params = tiny.draw_params(config)
  rounded = quantize_weights(params)
  # The same weights as floats, multiplied out in NumPy.
  floats = jax.tree.map(np.asarray, params)
  for name, group in floats["layers"].items():
    if "kernel" in group:
      n, s = (
        np.asarray(rounded["layers"][name][k]) for k in ("kernel", "scale")
      )
      contracted = 2 if name == "o" else 1
      s = s.reshape(len(s), *(1,) * contracted, *s.shape[1:])
      group["kernel"] = (n * s).astype("f4")
  scale = np.asarray(rounded["embedding_scale"])[:, None]
  floats["embedding"] = np.asarray(rounded["embedding"]) * scale
  if not tied:
    floats["head"] = np.asarray(rounded["head"]) * np.asarray(
      rounded["head_scale"]
    )
  tokens = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, 7))
  got, want = (
    models.logits(p, models.apply(p, tokens, c).hidden, c)
    for p, c in ((rounded, int8), (floats, config))
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  exact = models.logits(
    params, models.apply(params, tokens, config).hidden, config
  )
  # Single logits of so small a model move by up to 0.3, most of them little.
  assert 1e-4 < np.abs(got - exact).mean() < 0.05


def test_an_int8_cache_moves_logits_a_little():
  params = tiny.draw_params()
  config = dataclasses.replace(tiny.MODEL, cache_dtype="int8")
  tokens = np.random.default_rng(2).integers(0, tiny.VOCAB, (3, 9))
  lengths = np.full(3, 6, np.int32)

  def logits(config):
    out = models.prefill(params, tokens[:, :6], config, lengths=lengths)
    shared = models.Shared(out.cache, lengths)
    local = models.init_cache(config, 3, 4)
    new = models.apply_branches(
      params, tokens[:, 6:], config, shared=(shared,), local=local, slot=0
    )
    return models.logits(params, new.hidden, config), out.cache

  got, cache = logits(config)
  want, floats = logits(tiny.MODEL)
  assert cache.keys.dtype == cache.values.dtype == jnp.int8
  assert cache.key_scales.shape == cache.keys.shape[:-1]
  np.testing.assert_allclose(
    np.asarray(cache.keys) * np.asarray(cache.key_scales)[..., None],
    floats.keys,
    atol=float(cache.key_scales.max()) / 1.9,
  )
  assert 1e-5 < np.abs(got - want).max() < 0.05


def test_int8_on_several_devices_is_as_on_one():
  params = tiny.draw_params(scale=2.0)
  settings = {"weights": "int8", "cache": "int8"}
  options = {"max_new_tokens": 6, "eos_ids": (), "sampler": GREEDY}
  answers = []
  for mesh, tensor in ((tiny.mesh(), 1), (tiny.mesh(data=2, fsdp=4), 2)):
    layout = make_layout(
      tiny.MODEL, mesh, SamplingConfig(tensor=tensor, **settings)
    )
    placed = layout.place(tiny.place(params, tiny.MODEL, mesh))
    assert placed["embedding"].dtype == jnp.int8
    with jax.set_mesh(layout.mesh):
      answers.append(
        generate(placed, PROMPTS, jax.random.key(0), layout.model, **options)
      )
  one, split = answers
  np.testing.assert_array_equal(split.tokens, one.tokens)
  np.testing.assert_allclose(split.logps, one.logps, atol=1e-4)


def test_training_in_int8_is_refused():
  config = dataclasses.replace(tiny.MODEL, weight_dtype="int8")
  with pytest.raises(ConfigError, match="set sampling.weights"):
    config.validate()
