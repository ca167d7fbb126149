"""The decoder against a float64 oracle, and what must not change its answer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import decoder as oracle

from oreo_jax.config import MeshConfig, ModelConfig
from oreo_jax.models import (
  Shared,
  abstract_params,
  apply,
  apply_branches,
  carried,
  count_params,
  init,
  init_cache,
  logical_axes,
  logits,
  prefill,
  resting,
  segment_positions,
  stack_layers,
  unstack_layers,
  value_params,
  values,
)
from oreo_jax.sharding import RULES, make_mesh, shardings_of

TINY = ModelConfig(
  vocab_size=32,
  embed_dim=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=24,
)

VARIANTS = {
  "grouped": {},
  "multi_head": {"num_kv_heads": 4},
  "one_kv_head": {"num_kv_heads": 1},
  "untied": {"tie_embeddings": False},
  "bias": {"qkv_bias": True},
  "qk_norm": {"qk_norm": True},
  "window": {"sliding_window": 3},
  "llama3_rope": {
    "rope_theta": 100.0,
    "rope_scaling": (8.0, 1.0, 4.0, 64),
  },
  "multipliers": {
    "embed_scale": 3.0,
    "residual_scale": 0.4,
    "attention_scale": 0.3,
    "logit_scale": 0.25,
    "norm_eps": 1e-3,
  },
  "adapters": {
    "lora_rank": 3,
    "lora_alpha": 5.0,
    "lora_targets": ("q", "o", "gate", "down"),
  },
}


def make(config, head="lm", seed=0):
  """Random parameters; drawn by NumPy, which compiles nothing."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape)
    if "scale" in jax.tree_util.keystr(path):
      return jnp.asarray(1 + 0.2 * noise, leaf.dtype)
    return jnp.asarray(noise * 0.25, leaf.dtype)

  return jax.tree_util.tree_map_with_path(
    draw, abstract_params(config, head=head)
  )


@functools.partial(jax.jit, static_argnames="config")
def run(params, tokens, config, **inputs):
  return apply(params, tokens, config, **inputs)


def double(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def rows(*lengths, seed=0, vocab=32):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, vocab, n).astype(np.int32) for n in lengths]


def pack(sequences, length, filler=0):
  """Two arrays [1, length]: tokens and segment ids, padding at the end."""
  tokens = np.full((1, length), filler, np.int32)
  segments = np.zeros((1, length), np.int32)
  start = 0
  for k, sequence in enumerate(sequences, start=1):
    tokens[0, start : start + len(sequence)] = sequence
    segments[0, start : start + len(sequence)] = k
    start += len(sequence)
  return jnp.asarray(tokens), jnp.asarray(segments)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_oracle(name):
  config = dataclasses.replace(TINY, **VARIANTS[name])
  params = make(config)
  (tokens,) = rows(9)
  hidden = run(params, jnp.asarray(tokens)[None], config).hidden
  got = logits(params, hidden, config)[0]
  want = oracle.logits(double(params), tokens, config)
  np.testing.assert_allclose(got, want, atol=1e-5 * want.std())


def test_values_equal_the_oracle():
  params = make(TINY, head="value")
  (tokens,) = rows(7)
  hidden = run(params, jnp.asarray(tokens)[None], TINY).hidden
  want = oracle.values(double(params), tokens, TINY)
  np.testing.assert_allclose(values(params, hidden)[0], want, atol=1e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_packed_rows_equal_rows_of_their_own(window):
  config = dataclasses.replace(TINY, sliding_window=window)
  params = make(config)
  sequences = rows(5, 1, 8)
  tokens, segments = pack(sequences, 18)
  packed = run(params, tokens, config, segment_ids=segments).hidden[0]
  start = 0
  for sequence in sequences:
    alone = run(params, jnp.asarray(sequence)[None], config).hidden[0]
    part = packed[start : start + len(sequence)]
    np.testing.assert_allclose(part, alone, atol=5e-6)
    start += len(sequence)


def test_padding_content_is_irrelevant():
  params = make(TINY)
  sequences = rows(5, 6)
  quiet, segments = pack(sequences, 16)
  loud, _ = pack(sequences, 16, filler=31)

  def loss(params, tokens):
    hidden = apply(params, tokens, TINY, segment_ids=segments).hidden
    kept = jnp.where(segments[..., None] > 0, hidden, 0.0)
    return jnp.sum(kept**2), kept

  grad = jax.jit(jax.grad(loss, has_aux=True))
  quiet_grads, quiet_hidden = grad(params, quiet)
  loud_grads, loud_hidden = grad(params, loud)
  np.testing.assert_array_equal(quiet_hidden, loud_hidden)
  jax.tree.map(np.testing.assert_array_equal, quiet_grads, loud_grads)


def test_positions_restart_in_every_segment():
  segments = jnp.asarray([[1, 1, 2, 2, 2, 0, 0]])
  got = segment_positions(segments)
  np.testing.assert_array_equal(got, [[0, 1, 0, 1, 2, 0, 1]])


@pytest.mark.parametrize("window", [0, 4])
def test_prefill_equals_the_full_forward(window):
  config = dataclasses.replace(TINY, sliding_window=window)
  params = make(config)
  sequences = rows(7, 2, 5)
  tokens = np.full((3, 7), 9, np.int32)
  lengths = np.array([len(s) for s in sequences])
  for row, sequence in enumerate(sequences):
    tokens[row, : len(sequence)] = sequence
  out = jax.jit(prefill, static_argnames="config")(
    params, tokens, config, lengths=lengths
  )
  assert out.cache.keys.shape == (2, 3, TINY.num_kv_heads, 7, TINY.head_dim)
  for row, sequence in enumerate(sequences):
    alone = run(params, jnp.asarray(sequence)[None], config).hidden[0]
    got = out.hidden[row, : len(sequence)]
    np.testing.assert_allclose(got, alone, atol=5e-6)


@pytest.mark.parametrize("window", [0, 4])
def test_branches_equal_the_full_forward(window):
  # Two prompts are shared by three rows each, and each row has a text of its
  # own behind that. Then come the tokens in the ring of 4 slots, in which rows
  # begin at different steps, and begin again with other tokens 4 steps later.
  config = dataclasses.replace(TINY, sliding_window=window)
  params = make(config)
  room, slots = 6, 4
  begins = np.array([0, 1, 3, 2, 0, 1])
  prompts = rows(5, 2)
  own = rows(0, 3, 1, 2, 1, 0)
  new = [rows(*[slots] * 6, seed=seed) for seed in (1, 2)]
  branch = jax.jit(apply_branches, static_argnames="config")

  padded = np.full((2, 5), 9, np.int32)
  for row, prompt in enumerate(prompts):
    padded[row, : len(prompt)] = prompt
  lengths = jnp.array([5, 2])
  cache = prefill(params, padded, config, lengths=lengths).cache
  shared = Shared(cache, lengths)
  chunk = np.full((6, room), 9, np.int32)
  for row, text in enumerate(own):
    chunk[row, : len(text)] = text
  counts = jnp.array([len(text) for text in own])
  # What an earlier use of the buffers left behind must not show.
  cache = jax.tree.map(lambda x: x - 3.0, init_cache(config, 6, room))
  read = branch(params, chunk, config, shared=(shared,), local=cache, slot=0)
  levels = (shared, Shared(read.cache, counts))

  got = [[[], []] for _ in begins]
  cache = jax.tree.map(lambda x: x + 7.0, init_cache(config, 6, slots))
  for step in range(11):
    time, at = np.divmod(step - begins, slots)
    live = (step >= begins) & (time < 2)
    fed = [new[time[row]][row][at[row]] if live[row] else 9 for row in range(6)]
    out = branch(
      params,
      jnp.asarray(fed, jnp.int32)[:, None],
      config,
      shared=levels,
      local=cache,
      slot=step % slots,
      counts=jnp.asarray(np.where(live, at, 0)),
    )
    cache = out.cache
    for row in np.flatnonzero(live):
      got[row][time[row]].append(out.hidden[row, 0])
  for row, (first, again) in enumerate(got):
    prompt = prompts[row // 3]
    for tokens, hidden in ((new[0], first), (new[1], again)):
      text = np.concatenate([prompt, own[row], tokens[row]])
      alone = run(params, jnp.asarray(text)[None], config).hidden[0]
      begin = len(prompt)
      np.testing.assert_allclose(
        read.hidden[row, : len(own[row])],
        alone[begin : begin + len(own[row])],
        atol=5e-6,
      )
      np.testing.assert_allclose(np.stack(hidden), alone[-slots:], atol=5e-6)


@pytest.mark.parametrize("dtype", ["dtype", "int8"])
def test_layers_apart_equal_the_scan(dtype):
  config = dataclasses.replace(
    TINY, tie_embeddings=False, qk_norm=True, cache_dtype=dtype
  )
  stacked = make(config), config
  apart = unstack_layers(*stacked)
  tokens = jnp.asarray(np.stack(rows(6, 6)))
  lengths = jnp.array([6, 4])
  outs = []
  for weights, form in (stacked, apart):
    read = jax.jit(prefill, static_argnames="config")(
      weights, tokens, form, lengths=lengths
    )
    # As a loop does: what one step has written the next one reads.
    local = carried(init_cache(form, 4, 3))
    for slot in (1, 2):
      grown = jax.jit(apply_branches, static_argnames="config")(
        weights,
        jnp.asarray([[1], [2], [3], [4]]) + slot,
        form,
        shared=(Shared(read.cache, lengths),),
        local=local,
        slot=slot,
        counts=jnp.array([0, 1, 1, 0]) + slot - 1,
      )
      local = grown.cache
    caches = [
      [joined(each) for each in cache if each is not None]
      for cache in (read.cache, resting(local))
    ]
    outs.append((read.hidden[:, :4], caches, grown.hidden))
  jax.tree.map(
    lambda one, two: np.testing.assert_allclose(one, two, atol=2e-6), *outs
  )
  np.testing.assert_array_equal(
    apply(apart[0], tokens, apart[1]).hidden,
    apply(stacked[0], tokens, config).hidden,
  )
  weights, form = stack_layers(*apart)
  assert form == config
  jax.tree.map(np.testing.assert_array_equal, weights, stacked[0])
  with pytest.raises(ValueError, match="take both from `unstack_layers`"):
    prefill(apart[0], tokens, config, lengths=lengths)


def joined(field):
  """A field of a cache as one array [L, ...]."""
  return jnp.concatenate(field) if isinstance(field, tuple) else field


def assert_near(got, want):
  """Equal up to float32 rounding of the largest entry."""
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_eight_devices_equal_one():
  config = dataclasses.replace(TINY, tie_embeddings=False)
  params = make(config)
  tokens = jnp.asarray(np.stack(rows(8, 8, 8, 8)))

  def loss(params, tokens):
    hidden = apply(params, tokens, config).hidden
    return jnp.mean(logits(params, hidden, config) ** 2)

  step = jax.jit(jax.value_and_grad(loss))
  want, want_grads = step(params, tokens)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  shardings = shardings_of(logical_axes(config), abstract_params(config), mesh)
  with jax.set_mesh(mesh):
    split = jax.device_put(params, shardings)
    kernel = split["layers"]["q"]["kernel"]
    # [L, D, N, H]: embedding over fsdp, heads over tensor.
    assert kernel.addressable_shards[0].data.shape == (2, 8, 2, 6)
    assert split["head"].addressable_shards[0].data.shape == (8, 16)
    got, got_grads = step(split, tokens)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  jax.tree.map(assert_near, got_grads, want_grads)


@pytest.mark.parametrize(
  "remat,unroll", [("full", 1), ("dots", 2), ("attention", 1)]
)
def test_remat_and_unroll_change_nothing(remat, unroll):
  params = make(TINY)
  (tokens,) = rows(8)

  def grads(config):
    def loss(params):
      hidden = apply(params, jnp.asarray(tokens)[None], config).hidden
      return jnp.mean(logits(params, hidden, config) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)

  want = grads(TINY)
  got = grads(dataclasses.replace(TINY, remat=remat, unroll=unroll))
  jax.tree.map(assert_near, got, want)


@pytest.mark.parametrize(
  "name,remat",
  [("blockwise", "none"), ("blockwise", "dots"), ("splash", "full")],
)
def test_attention_changes_nothing(name, remat):
  params = make(TINY)
  tokens, segments = pack(rows(5, 1, 8), 18)

  def grads(**settings):
    config = dataclasses.replace(TINY, sliding_window=6, **settings)

    def loss(params):
      hidden = apply(params, tokens, config, segment_ids=segments).hidden
      return jnp.mean(logits(params, hidden, config) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)

  want = grads(attention="reference")
  got = grads(attention=name, remat=remat)
  jax.tree.map(assert_near, got, want)


def test_remat_policies_keep_what_they_say():
  params = make(TINY)
  tokens = jnp.asarray(np.stack(rows(8, 8)))

  def kept(remat):
    """Numbers that wait for the backward pass; nothing is computed."""
    config = dataclasses.replace(TINY, remat=remat)

    def pullback(params):
      return jax.vjp(lambda p: apply(p, tokens, config).hidden, params)[1]

    return sum(
      leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, params))
    )

  full, attention, dots, none = map(kept, ("full", "attention", "dots", "none"))
  layers = TINY.num_layers * tokens.size
  heads = TINY.num_heads + 2 * TINY.num_kv_heads
  # Queries, keys, values, and the values that attention mixed for each query.
  heads += TINY.num_heads
  assert attention - full == layers * heads * TINY.head_dim
  # What comes out of the MLP is only added, which needs no backward pass.
  assert dots - attention == layers * (2 * TINY.mlp_dim + TINY.embed_dim)
  assert dots < none


def test_bfloat16_stays_close_and_keeps_its_dtypes():
  config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
  params = make(config)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  tokens = jnp.asarray(np.stack(rows(8, 8)))
  hidden = run(params, tokens, config).hidden
  assert hidden.dtype == jnp.bfloat16
  assert params["layers"]["q"]["kernel"].dtype == jnp.bfloat16
  got = logits(params, hidden, config)
  want = logits(wide, run(wide, tokens, TINY).hidden, TINY)
  assert got.dtype == jnp.float32
  assert float(jnp.abs(got - want).mean()) < 0.05 * float(want.std())


def test_value_network_starts_as_a_copy_with_a_zero_head():
  config = dataclasses.replace(TINY, tie_embeddings=False)
  params = make(config)
  critic = value_params(params, config)
  assert "head" not in critic
  assert critic["embedding"] is not params["embedding"]
  (tokens,) = rows(4)
  out = run(critic, jnp.asarray(tokens)[None], config).hidden
  same = run(params, jnp.asarray(tokens)[None], config).hidden
  np.testing.assert_array_equal(out, same)
  np.testing.assert_array_equal(values(critic, out), np.zeros((1, 4)))


@pytest.mark.parametrize("head", ["lm", "value"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_dimension_has_a_meaning_and_every_shape_is_known(name, head):
  config = dataclasses.replace(TINY, **VARIANTS[name])
  axes = logical_axes(config, head=head)
  shapes = abstract_params(config, head=head)
  params = jax.eval_shape(
    lambda key: init(key, config, head=head), jax.random.key(0)
  )

  def check(axes, shape, array):
    assert len(axes) == len(shape.shape)
    assert set(axes) <= set(RULES)
    assert (shape.shape, shape.dtype) == (array.shape, array.dtype)

  jax.tree.map(
    check, axes, shapes, params, is_leaf=lambda x: isinstance(x, tuple)
  )
  assert count_params(shapes) == sum(x.size for x in jax.tree.leaves(params))


def test_bad_shapes_name_the_argument():
  params = make(TINY)
  tokens = jnp.zeros((2, 3), jnp.int32)
  with pytest.raises(ValueError, match=r"tokens: expected \[B, T\]"):
    apply(params, tokens[0], TINY)
  with pytest.raises(ValueError, match="segment_ids: expected the shape"):
    apply(params, tokens, TINY, segment_ids=tokens[:, :2])
  with pytest.raises(ValueError, match="vocab_size is not set"):
    init(jax.random.key(0), dataclasses.replace(TINY, vocab_size=0))
  with pytest.raises(ValueError, match="head: expected one of"):
    init(jax.random.key(0), TINY, head="critic")
