"""Every implementation of attention against an oracle and the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import attention as oracle

from oreo_jax.config import ConfigError, MeshConfig, ModelConfig
from oreo_jax.models import packed_attention
from oreo_jax.models.packed_attention import IMPLEMENTATIONS, attend_packed
from oreo_jax.sharding import make_mesh

SCALE = 0.3
# Blocks far smaller than the rows, so that loops over blocks have many turns.
# Off a GPU `cudnn` is XLA's computation of the very call that a GPU gets, and
# off a TPU `splash` is the TPU's kernel in Pallas' interpreter.
BLOCKS = {"reference": 0, "blockwise": 8, "cudnn": 0, "splash": 128}


def config_of(name, *, block=None, window=0):
  block = BLOCKS[name] if block is None else block
  return ModelConfig(
    attention=name, attention_block=block, sliding_window=window
  )


def segments_of(*rows, length):
  """i32[B, length]; a row is the lengths of its sequences, then padding."""
  ids = np.zeros((len(rows), length), np.int32)
  for row, lengths in zip(ids, rows, strict=True):
    filled = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    row[: len(filled)] = filled
  return ids


def random_segments(seed, *, batch, length):
  """Rows of sequences of any length, the last of them nothing but padding."""
  rng = np.random.default_rng(seed)
  rows = []
  for _ in range(batch - 1):
    cuts = rng.multinomial(rng.integers(length // 2, length + 1), [0.2] * 5)
    rows.append([n for n in cuts if n])
  return segments_of(*rows, [], length=length)


def random_inputs(segment_ids, *, heads=4, kv_heads=2, width=8, seed=0):
  rng = np.random.default_rng(seed)
  batch, length = segment_ids.shape
  return tuple(
    jnp.asarray(rng.normal(size=(batch, length, n, width)), jnp.float32)
    for n in (heads, kv_heads, kv_heads)
  )


@functools.partial(jax.jit, static_argnums=0)
def run(config, query, key, value, segment_ids):
  return attend_packed(config, segment_ids)(query, key, value, SCALE)


@functools.partial(jax.jit, static_argnums=0)
def run_and_differentiate(config, query, key, value, segment_ids, weights):
  """Returns the output and the gradients of its sum weighted by `weights`."""

  def attend(query, key, value):
    return attend_packed(config, segment_ids)(query, key, value, SCALE)

  mixed, pull_back = jax.vjp(attend, query, key, value)
  return mixed, *pull_back(weights)


def assert_equal(got, want, atol=1e-5):
  for got_one, want_one in zip(got, want, strict=True):
    np.testing.assert_allclose(got_one, want_one, atol=atol)


def assert_equals_reference(config, segment_ids, **shape):
  """Compares output and gradients."""
  inputs = random_inputs(segment_ids, **shape)
  weights = random_inputs(segment_ids, **shape, seed=1)[0]
  reference = dataclasses.replace(config, attention="reference")
  got, want = (
    run_and_differentiate(c, *inputs, segment_ids, weights)
    for c in (config, reference)
  )
  assert_equal(got, want)


@pytest.mark.parametrize(
  "length,window,heads,kv_heads",
  [(24, 0, 4, 4), (29, 0, 4, 2), (29, 5, 6, 1), (29, 17, 4, 2)],
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output_equals_the_oracle(name, length, window, heads, kv_heads):
  segment_ids = random_segments(length, batch=3, length=length)
  inputs = random_inputs(segment_ids, heads=heads, kv_heads=kv_heads)
  got = run(config_of(name, window=window), *inputs, segment_ids)
  want = oracle.attend(*inputs, segment_ids, scale=SCALE, sliding_window=window)
  np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize(
  "window,heads,kv_heads", [(0, 4, 4), (0, 4, 2), (5, 6, 1)]
)
@pytest.mark.parametrize("name", ["blockwise", "cudnn", "splash"])
def test_gradients_equal_the_references(name, window, heads, kv_heads):
  segment_ids = random_segments(3, batch=3, length=29)
  config = config_of(name, window=window)
  assert_equals_reference(config, segment_ids, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("name", ["blockwise", "splash"])
def test_rows_of_several_large_blocks(name):
  segment_ids = segments_of([100, 130, 70], [290], length=300)
  assert_equals_reference(config_of(name, block=128), segment_ids)


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_a_block_need_not_fit_the_row(length):
  segment_ids = segments_of([length], length=length)
  inputs = random_inputs(segment_ids)
  got = run(config_of("blockwise"), *inputs, segment_ids)
  want = oracle.attend(*inputs, segment_ids, scale=SCALE)
  np.testing.assert_allclose(got, want, atol=5e-6)


def test_segments_need_not_be_in_order():
  """Blocks are left out by the range of their ids; equal ids may be far."""
  rng = np.random.default_rng(0)
  segment_ids = rng.integers(0, 4, (2, 40)).astype(np.int32)
  assert_equals_reference(config_of("blockwise"), segment_ids)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_packed_sequences_do_not_see_each_other(name):
  lengths = (9, 1, 14)
  packed_ids = segments_of(lengths, length=32)
  inputs = random_inputs(packed_ids)
  packed = run(config_of(name), *inputs, packed_ids)[0]
  start = 0
  for length in lengths:
    row = slice(start, start + length)
    alone = run(
      config_of(name),
      *(x[:, row] for x in inputs),
      segments_of([length], length=length),
    )
    np.testing.assert_allclose(packed[row], alone[0], atol=1e-6)
    start += length


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_scores_and_padding_stay_finite(name):
  segment_ids = segments_of([10, 9], [], length=24)
  inputs = [x * 100 for x in random_inputs(segment_ids)]
  weights = jnp.ones_like(inputs[0])
  results = run_and_differentiate(
    config_of(name), *inputs, segment_ids, weights
  )
  assert all(np.isfinite(x).all() for x in results)


@pytest.mark.parametrize("name", ["blockwise", "cudnn", "splash"])
def test_bfloat16_keeps_its_dtype_and_stays_close(name):
  segment_ids = random_segments(0, batch=2, length=40)
  inputs = [x.astype(jnp.bfloat16) for x in random_inputs(segment_ids)]
  weights = random_inputs(segment_ids, seed=1)[0].astype(jnp.bfloat16)
  # jax.nn.dot_product_attention itself mixes bfloat16 and float32.
  with jax.numpy_dtype_promotion("standard"):
    got = run_and_differentiate(config_of(name), *inputs, segment_ids, weights)
  inputs = [x.astype(jnp.float32) for x in (*inputs, weights)]
  weights = inputs.pop()
  reference = config_of("reference")
  want = run_and_differentiate(reference, *inputs, segment_ids, weights)
  for got_one, want_one in zip(got, want, strict=True):
    assert got_one.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got_one, np.float32) - want_one)
    assert error.mean() < 0.01 * np.std(want_one)


# tensor=2 splits the two keys, tensor=4 gives two devices the same one, and
# tensor=8 does not divide the four queries, which then stay whole. Six rows
# divide over two devices and not over eight.
MESHES = {
  "all": (8, MeshConfig(data=2, fsdp=2, tensor=2)),
  "shared_keys": (6, MeshConfig(fsdp=2, tensor=4)),
  "whole_rows": (6, MeshConfig(data=8)),
  "whole_heads": (8, MeshConfig(tensor=8)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name,mesh",
  [("reference", "all"), ("cudnn", "all"), ("splash", "shared_keys")]
  + [("blockwise", mesh) for mesh in MESHES],
)
def test_eight_devices_equal_one(name, mesh):
  config = config_of(name)
  batch, mesh_config = MESHES[mesh]
  segment_ids = random_segments(batch, batch=batch, length=29)
  inputs = random_inputs(segment_ids)
  weights = random_inputs(segment_ids, seed=1)[0]
  want = run_and_differentiate(config, *inputs, segment_ids, weights)
  with jax.set_mesh(make_mesh(mesh_config)):
    got = run_and_differentiate(config, *inputs, segment_ids, weights)
  assert_equal(got, want)


def temporary_bytes(name, length):
  """What the compiler needs beside arguments and results of the gradients."""
  token = jax.ShapeDtypeStruct((1, length), jnp.int32)
  head = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
  config = config_of(name, block=64)
  lowered = run_and_differentiate.lower(config, head, head, head, token, head)
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_linearly_with_the_row():
  sizes = [temporary_bytes("blockwise", n) for n in (1024, 2048, 4096)]
  assert sizes[1] < 2.1 * sizes[0] and sizes[2] < 2.1 * sizes[1]
  # The reference keeps its scores, [N, T, T].
  assert temporary_bytes("reference", 4096) > 2 * 4 * 4096**2 > 30 * sizes[2]


@pytest.mark.parametrize(
  "platform,dtype,length,width,want",
  [
    ("cpu", "float32", 128, 64, "reference"),
    ("cpu", "float32", 129, 64, "blockwise"),
    ("tpu", "float32", 64, 64, "splash"),
    ("tpu", "bfloat16", 2048, 128, "splash"),
    ("gpu", "bfloat16", 2048, 128, "cudnn"),
    ("gpu", "bfloat16", 2048, 136, "blockwise"),
    ("gpu", "bfloat16", 2047, 128, "blockwise"),
    ("gpu", "float32", 2048, 128, "blockwise"),
  ],
)
def test_auto_chooses_by_backend(platform, dtype, length, width, want):
  config = ModelConfig(dtype=dtype, head_dim=width)
  assert packed_attention._fastest(config, length, platform) == want


def test_settings_that_cannot_work_are_refused(monkeypatch):
  with pytest.raises(ConfigError, match="config.attention: expected one of"):
    ModelConfig(attention="flash").validate()
  segment_ids = segments_of([20], length=20)
  inputs = random_inputs(segment_ids)
  config = config_of("splash", block=100)
  with pytest.raises(ValueError, match="a multiple of 128, got 100"):
    run(config, *inputs, segment_ids)
  monkeypatch.setattr(packed_attention, "_platform", lambda: "gpu")
  config = dataclasses.replace(config_of("cudnn"), norm_eps=1e-7)
  with pytest.raises(ValueError, match="cuDNN's attention expects bfloat16"):
    run(config, *inputs, segment_ids)
