"""The chunked head: numbers, gradients, memory, dtypes and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from oreo_jax import losses

B, T, D, V = 8, 11, 6, 32


def draw(seed=0, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 5)
  normal = jax.random.normal
  return {
    "hidden": normal(keys[0], (B, T, D)).astype(dtype),
    "head": normal(keys[1], (D, V)).astype(dtype),
    "tokens": jax.random.randint(keys[2], (B, T), 0, V),
    "ref_hidden": normal(keys[3], (B, T, D)).astype(dtype),
    "ref_head": normal(keys[4], (D, V)).astype(dtype),
  }


@functools.partial(
  jax.jit, static_argnames=("chunk_size", "vocab_chunk", "kl_direction")
)
def outputs_and_grads(arrays, **options):
  """All outputs, and gradients of a sum that weighs every output its own."""

  def total(arrays):
    out = losses.token_logprobs(**arrays, **options)
    weights = np.linspace(0.1, 1.0, B * T, dtype=np.float32).reshape(B, T)
    outputs = (out.logps, 2.0 * out.kl, 3.0 * out.ref_logps, 5.0 * out.entropy)
    return sum(jnp.sum(weights * output) for output in outputs), out

  arrays = dict(arrays)
  tokens = arrays.pop("tokens")
  (_, out), grads = jax.value_and_grad(
    lambda rest: total({**rest, "tokens": tokens}), has_aux=True
  )(arrays)
  return out, grads


def dense(arrays, direction, scale):
  """Float64 log-softmax over the whole vocabulary."""
  arrays = {k: np.asarray(v, np.float64) for k, v in arrays.items()}
  tokens = arrays["tokens"].astype(int)

  def log_softmax(hidden, head):
    logits = scale * hidden @ head
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  pi = log_softmax(arrays["hidden"], arrays["head"])
  ref = log_softmax(arrays["ref_hidden"], arrays["ref_head"])
  pick = functools.partial(
    np.take_along_axis, indices=tokens[..., None], axis=2
  )
  first, second = (pi, ref) if direction == "reverse" else (ref, pi)
  return losses.TokenLogprobs(
    logps=pick(pi)[..., 0],
    ref_logps=pick(ref)[..., 0],
    kl=(np.exp(first) * (first - second)).sum(-1),
    entropy=-(np.exp(pi) * pi).sum(-1),
  )


def assert_close(actual, expected, **tolerance):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, **tolerance), actual, expected
  )


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_equals_the_dense_log_softmax(direction):
  arrays = draw()
  out, _ = outputs_and_grads(
    arrays, chunk_size=4, kl_direction=direction, logit_scale=0.7
  )
  assert_close(out, dense(arrays, direction, 0.7), rtol=2e-5, atol=2e-6)


# Blocks of the vocabulary: one; some that tile it; 29 columns, which overlap.
@pytest.mark.parametrize(
  "chunk_size,vocab,vocab_chunk",
  [(1, V, V), (4, V, 8), (11, V, 5), (4, 29, 8), (T, 29, 28)],
)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_chunks_change_nothing(direction, chunk_size, vocab, vocab_chunk):
  arrays = draw(1)
  arrays |= {k: arrays[k][:, :vocab] for k in ("head", "ref_head")}
  arrays["tokens"] %= vocab
  options = {"logit_scale": 0.7, "kl_direction": direction}
  dense_head = outputs_and_grads(arrays, chunk_size=T + 1, **options)
  chunked = outputs_and_grads(
    arrays, chunk_size=chunk_size, vocab_chunk=vocab_chunk, **options
  )
  assert_close(chunked, dense_head, rtol=1e-4, atol=1e-5)
  expected = dense(arrays, direction, 0.7)
  assert_close(chunked[0], expected, rtol=2e-5, atol=2e-6)


def test_gradients_of_a_frozen_head_and_of_a_part_of_the_outputs():
  """What no one asks for is not computed, and what is left is the same."""
  arrays = draw(7)
  fixed = {k: x for k, x in arrays.items() if k not in ("hidden", "head")}

  def grads(names, wanted):
    def total(*leaves):
      given = arrays | dict(zip(names, leaves, strict=True)) | fixed
      out = losses.token_logprobs(**given, chunk_size=4, vocab_chunk=8)
      return sum(jnp.sum(getattr(out, name) ** 2) for name in wanted)

    argnums = tuple(range(len(names)))
    gradient = jax.jit(jax.grad(total, argnums))
    leaves = [arrays[name] for name in names]
    return gradient(*leaves), gradient.lower(*leaves).as_text()

  (both, _), text = grads(("hidden", "head"), ("logps", "kl"))
  (hidden,), frozen_text = grads(("hidden",), ("logps", "kl"))
  np.testing.assert_allclose(hidden, both, rtol=1e-6)
  # Two products for the logits in each pass, one for each gradient.
  products = [x.count("dot_general") for x in (text, frozen_text)]
  assert products == [6, 5]
  (logps, _), text = grads(("hidden", "head"), ("logps",))
  # Nothing of the reference is made where its outputs are not read.
  assert text.count("dot_general") == 4
  (kl, _), _ = grads(("hidden", "head"), ("kl",))
  np.testing.assert_allclose(logps + kl, both, rtol=1e-4, atol=1e-5)


# Of T = 11 positions, by row: all, some in the middle, none.
MASK = np.zeros((B, T), bool)
MASK[0] = True
MASK[1, 3:7] = True


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("keep_logits", [0, 10**6])
def test_a_mask_leaves_the_asked_positions_as_they_are(direction, keep_logits):
  arrays = draw(8)
  options = {"chunk_size": 3, "vocab_chunk": 8, "kl_direction": direction}
  weights = jax.random.normal(jax.random.key(9), (2, B, T))

  def total(trained, mask, **more):
    out = losses.token_logprobs(
      **arrays | trained, **options, **more, mask=mask
    )
    read = jnp.where(MASK, weights[0] * out.logps + weights[1] * out.kl, 0.0)
    return read.sum(), out

  trained = {name: arrays[name] for name in ("hidden", "head")}
  gradient = jax.jit(
    jax.grad(total, has_aux=True), static_argnames="keep_logits"
  )
  grads, out = gradient(trained, jnp.asarray(MASK), keep_logits=keep_logits)
  expected_grads, expected = gradient(trained, None)
  assert_close(
    out,
    jax.tree.map(lambda x: np.where(MASK, x, 0.0), expected),
    rtol=1e-5,
    atol=1e-6,
  )
  assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(grads["hidden"][~MASK], 0.0)


def test_blocks_without_a_masked_position_are_not_computed():
  arrays = draw(8)
  mask = np.zeros((B, T), bool)
  mask[:, 2:6] = True  # four positions a row, two blocks
  # What is computed of these would show: 0 times NaN is NaN.
  hidden = jnp.where(mask[..., None], arrays["hidden"], jnp.nan)

  def total(hidden):
    out = losses.token_logprobs(
      **arrays | {"hidden": hidden}, chunk_size=2, mask=jnp.asarray(mask)
    )
    return (out.logps + out.kl).sum()

  value, grad = jax.value_and_grad(total)(hidden)
  assert np.isfinite(value)
  np.testing.assert_array_equal(np.isfinite(grad), True)


def test_kept_logits_are_not_made_again():
  arrays = draw(7)
  names = ("hidden", "head")

  def grads(keep_logits):
    def total(*leaves):
      given = arrays | dict(zip(names, leaves, strict=True))
      out = losses.token_logprobs(
        **given, chunk_size=4, vocab_chunk=8, keep_logits=keep_logits
      )
      return jnp.sum(out.logps**2) + jnp.sum(out.kl)

    gradient = jax.jit(jax.grad(total, (0, 1)))
    leaves = [arrays[name] for name in names]
    text = gradient.lower(*leaves).as_text()
    return gradient(*leaves), text.count("dot_general")

  # T = 11 is padded to 12 positions in blocks of 4.
  limit = B * 12 * V
  again, products = grads(limit - 1)
  kept, fewer_products = grads(limit)
  assert (products, fewer_products) == (6, 4)
  assert_close(kept, again, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  "mask", [jnp.ones((B, T + 1), bool), jnp.ones((B, T), jnp.float32)]
)
def test_a_mask_of_another_shape_or_dtype_is_refused(mask):
  with pytest.raises(ValueError, match="expected mask as bool"):
    losses.token_logprobs(**draw(), mask=mask)


def test_gradient_reaches_the_policy_alone():
  _, grads = outputs_and_grads(draw(2), chunk_size=4)
  assert all(jnp.any(grads[k] != 0.0) for k in ("hidden", "head"))
  assert not any(jnp.any(grads[k] != 0.0) for k in ("ref_hidden", "ref_head"))


def test_entropy_has_no_gradient():
  arrays = draw(2)
  grads = jax.jit(
    jax.grad(
      lambda h: losses.token_logprobs(
        h, arrays["head"], arrays["tokens"], chunk_size=4
      ).entropy.sum()
    )
  )(arrays["hidden"])
  np.testing.assert_array_equal(grads, 0.0)


def test_policy_equal_to_reference_has_no_kl():
  arrays = draw(3)
  arrays |= {"ref_hidden": arrays["hidden"], "ref_head": arrays["head"]}
  out, _ = outputs_and_grads(arrays, chunk_size=4)
  np.testing.assert_array_equal(out.kl, 0.0)
  np.testing.assert_array_equal(out.logps, out.ref_logps)


def largest_array(jaxpr):
  """Elements of the largest array made anywhere in a jaxpr."""
  sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
  inner = [
    largest_array(inner.jaxpr if hasattr(inner, "jaxpr") else inner)
    for e in jaxpr.eqns
    for value in e.params.values()
    for inner in (value if isinstance(value, (list, tuple)) else [value])
    if hasattr(inner, "jaxpr") or hasattr(inner, "eqns")
  ]
  return max([*sizes, *inner], default=0)


def test_no_array_of_all_logits_forward_or_backward():
  # V far above D and T, so that logits are the largest arrays around.
  b, t, d, v, chunk, vocab_chunk = 2, 64, 3, 1000, 8, 500
  floats = {
    "hidden": jnp.zeros((b, t, d)),
    "head": jnp.zeros((d, v)),
    "ref_hidden": jnp.zeros((b, t, d)),
    "ref_head": jnp.zeros((d, v)),
  }

  def largest(chunk_size, vocab_chunk):
    def total(floats):
      out = losses.token_logprobs(
        **floats,
        tokens=jnp.zeros((b, t), jnp.int32),
        chunk_size=chunk_size,
        vocab_chunk=vocab_chunk,
      )
      return out.logps.sum() + out.kl.sum() + out.entropy.sum()

    return largest_array(
      jax.make_jaxpr(jax.value_and_grad(total))(floats).jaxpr
    )

  assert largest(t, v) == b * t * v  # the measure does see them
  assert largest(chunk, v) == b * chunk * v
  assert largest(chunk, vocab_chunk) == b * chunk * vocab_chunk


def head_memory(vocab, direction, **options):
  """What the compiler says of loss and gradients: of temporaries, of results.

  All of it is known without running it.
  """
  b, t, d = 2, 256, 32
  float_, int_ = jnp.float32, jnp.int32
  shapes = {"hidden": (b, t, d), "head": (d, vocab)}
  shapes |= {f"ref_{name}": shape for name, shape in shapes.items()}
  floats = {k: jax.ShapeDtypeStruct(x, float_) for k, x in shapes.items()}

  def total(trained, frozen, tokens):
    out = losses.token_logprobs(
      **trained, **frozen, tokens=tokens, kl_direction=direction, **options
    )
    return (out.logps + out.kl + out.entropy).sum()

  trained = {k: floats.pop(k) for k in ("hidden", "head")}
  memory = (
    jax.jit(jax.value_and_grad(total))
    .lower(trained, floats, jax.ShapeDtypeStruct((b, t), int_))
    .compile()
    .memory_analysis()
  )
  return memory.temp_size_in_bytes, memory.output_size_in_bytes


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_temporary_memory_does_not_grow_with_the_vocabulary(direction):
  """Flat from 32k to 152k; only the head and its gradient, [D, V], grow."""
  options = {"chunk_size": 64, "vocab_chunk": 4096}
  small, results = head_memory(32_000, direction, **options)
  large, large_results = head_memory(151_936, direction, **options)
  assert large_results - results == (151_936 - 32_000) * 32 * 4
  assert large < 1.1 * small
  # Some blocks of logits and gradients of hidden states, and nothing of V.
  assert large < 12 * (2 * 64 * 4096) * 4


def test_bfloat16_inputs_have_a_float32_softmax():
  arrays = draw(4, jnp.bfloat16)
  out, grads = outputs_and_grads(arrays, chunk_size=4)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(out))
  assert grads["hidden"].dtype == grads["head"].dtype == jnp.bfloat16
  assert_close(out, dense(arrays, "reverse", 1.0), rtol=2e-5, atol=2e-5)


def test_gradient_of_a_bfloat16_head_is_summed_in_float32():
  arrays = draw(5, jnp.bfloat16)
  exact = jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays
  )
  _, expected = outputs_and_grads(exact, chunk_size=1)
  _, actual = outputs_and_grads(arrays, chunk_size=1)
  # Rounded once, not at each of T chunks, whose sum would lose two digits.
  error = np.abs(np.asarray(actual["head"], np.float32) - expected["head"])
  assert error.max() < 2**-7 * np.abs(expected["head"]).max()


def test_a_bfloat16_model_reads_the_float32_table_of_its_tokens():
  # A model with tied embeddings, trained from float32 masters.
  arrays = draw(6, jnp.bfloat16)
  table = jax.random.normal(jax.random.key(7), (V, D))

  @jax.jit
  def grads_of(hidden, table):
    def loss(hidden, table):
      out = losses.token_logprobs(
        hidden, table.T, arrays["tokens"], chunk_size=T
      )
      return jnp.sum(out.logps)

    return jax.grad(loss, argnums=(0, 1))(hidden, table)

  hidden_grad, table_grad = grads_of(arrays["hidden"], table)
  assert hidden_grad.dtype == jnp.bfloat16 and table_grad.dtype == jnp.float32
  rounded = table.astype(jnp.bfloat16).astype(jnp.float32)
  _, expected = grads_of(arrays["hidden"].astype(jnp.float32), rounded)
  error = np.abs(np.asarray(table_grad) - np.asarray(expected))
  assert error.max() < 2**-6 * np.abs(np.asarray(expected)).max()


@pytest.mark.parametrize("low", [-1e9, -3e38, -np.inf])
def test_impossible_tokens_keep_gradients_finite(low):
  # A head that rules out the upper half of the vocabulary, as a padded
  # vocabulary does, in policy, reference or both.
  ruled_out = jnp.zeros((D, V)).at[0, V // 2 :].set(max(low, -3e38))
  scale = 1.0 if np.isfinite(low) else 1e3  # overflows to -inf in float32
  hidden = jnp.zeros((B, T, D)).at[..., 0].set(scale)
  tokens = jnp.zeros((B, T), jnp.int32)
  even = jnp.zeros((D, V))
  for head, ref_head in [
    (ruled_out, ruled_out),
    (ruled_out, even),
    (even, ruled_out),
  ]:
    arrays = {
      "hidden": hidden.astype(jnp.bfloat16),
      "head": head.astype(jnp.bfloat16),
      "tokens": tokens,
      "ref_hidden": hidden.astype(jnp.bfloat16),
      "ref_head": ref_head.astype(jnp.bfloat16),
    }
    out, grads = outputs_and_grads(arrays, chunk_size=4)
    for x in jax.tree.leaves((out, grads["head"])):
      assert bool(jnp.all(jnp.isfinite(x)))
    possible = V if head is even else V // 2
    np.testing.assert_allclose(out.logps, -np.log(possible), rtol=1e-6)
    np.testing.assert_allclose(out.entropy, np.log(possible), rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [4, 16])
def test_sharded_inputs_give_the_same(chunk_size):
  arrays = draw(6)
  expected = outputs_and_grads(arrays, chunk_size=chunk_size)
  mesh = jax.make_mesh(
    (4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  specs = {
    "hidden": P("data", None, None),
    "head": P(None, "tensor"),
    "tokens": P("data", None),
    "ref_hidden": P("data", None, None),
    "ref_head": P(None, "tensor"),
  }
  sharded = {
    k: jax.device_put(x, NamedSharding(mesh, specs[k]))
    for k, x in arrays.items()
  }
  out, grads = outputs_and_grads(sharded, chunk_size=chunk_size)
  assert_close((out, grads), expected, rtol=1e-4, atol=1e-5)
  assert out.logps.sharding.shard_shape((B, T)) == (B // 4, T)
  # Neither logits nor heads are gathered: only per-token sums cross devices.
  text = outputs_and_grads.lower(sharded, chunk_size=chunk_size).compile()
  assert "all-gather" not in text.as_text()


def test_mistakes_are_named():
  arrays = draw()
  with pytest.raises(ValueError, match="ref_hidden and ref_head belong"):
    losses.token_logprobs(**{**arrays, "ref_head": None})
  with pytest.raises(ValueError, match=r"must be transposed"):
    losses.token_logprobs(**{**arrays, "head": arrays["head"].T})
  with pytest.raises(ValueError, match="kl_direction"):
    losses.token_logprobs(**arrays, kl_direction="both")
  with pytest.raises(ValueError, match="chunk_size"):
    losses.token_logprobs(**arrays, chunk_size=0)
  with pytest.raises(ValueError, match="vocab_chunk"):
    losses.token_logprobs(**arrays, vocab_chunk=0)
  with pytest.raises(ValueError, match="share the vocabulary"):
    losses.token_logprobs(**{**arrays, "ref_head": arrays["head"][:, 1:]})
