"""The output head on meshes: its numbers, and what crosses the mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import tiny

from oreo_jax import losses
from oreo_jax.sharding import BATCH_AXES, shardings_of
from oreo_jax.train.head import token_logprobs

B, T, D = 8, 6, 8
MESHES = [
  {"fsdp": 8},
  {"fsdp": 4, "tensor": 2},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"tensor": 8},
]


def draw(vocab, rows=B, width=D):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  return {
    "hidden": normal(rows, T, width),
    "head": normal(width, vocab),
    "tokens": jnp.asarray(rng.integers(0, vocab, (rows, T)), jnp.int32),
    "ref_hidden": normal(rows, T, width),
    "ref_head": normal(width, vocab),
  }


def place(arrays, mesh):
  """Rows over the batch axes, heads as the rules say."""
  head = shardings_of(
    {"head": ("embed", "vocab")}, {"head": arrays["head"]}, mesh
  )["head"]
  rows = NamedSharding(mesh, P(BATCH_AXES))
  return {
    name: jax.device_put(x, head if name.endswith("head") else rows)
    for name, x in arrays.items()
  }


def outputs_and_grads(function, **options):
  """Jitted: all outputs, and gradients of an uneven sum of them."""

  def evaluate(arrays):
    fixed = {k: x for k, x in arrays.items() if k not in ("hidden", "head")}

    def total(trained):
      out = function(**trained, **fixed, **options)
      weights = jnp.linspace(0.1, 1.0, out.logps.size)
      weights = weights.reshape(out.logps.shape)
      return jnp.sum(weights * (out.logps + 2.0 * out.kl)), out

    trained = {k: arrays[k] for k in ("hidden", "head")}
    (_, out), grads = jax.value_and_grad(total, has_aux=True)(trained)
    return out, grads

  return jax.jit(evaluate)


# The hidden states of `fsdp` are fewer than 96 columns, and more than 32; 33
# columns and a width of 7 do not divide.
@pytest.mark.parametrize("vocab, width", [(96, D), (32, D), (33, 7)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_equals_the_plain_head(sizes, masked, vocab, width):
  arrays = draw(vocab, width=width)
  options = {
    "chunk_size": 4,
    "vocab_chunk": 8,
    "logit_scale": 0.7,
    "kl_direction": "forward" if vocab == 32 else "reverse",
  }
  if masked:
    # Rows with no, one, ... positions that are asked for, none at the start.
    wanted = jnp.arange(T)[None] >= T - jnp.arange(B)[:, None] % T
    options |= {"keep_logits": 10**6}
    arrays["mask"] = wanted
  want = outputs_and_grads(losses.token_logprobs, **options)(arrays)
  mesh = tiny.mesh(**sizes)
  with jax.set_mesh(mesh):
    got = outputs_and_grads(token_logprobs, **options)(place(arrays, mesh))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    got,
    want,
  )


def test_rows_that_do_not_divide_are_left_to_the_partitioner():
  arrays = draw(32, rows=6)
  options = {"chunk_size": 4}
  want = outputs_and_grads(losses.token_logprobs, **options)(arrays)
  with jax.set_mesh(tiny.mesh(fsdp=8)):
    got = outputs_and_grads(token_logprobs, **options)(arrays)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    got,
    want,
  )


def collectives(text):
  """(operation, elements of its result) of every collective of an HLO text."""
  sizes = []
  names = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
  pattern = rf"= \(?\w+\[([\d,]*)\][^=]*? ({names})(?:-start)?\("
  for line in text.splitlines():
    match = re.search(pattern, line)
    if match:
      shape = [int(x) for x in match[1].split(",") if x]
      sizes.append((match[2], int(np.prod(shape))))
  return sizes


@pytest.mark.parametrize("way", ["head", "rows"])
def test_the_head_is_gathered_once_or_not_at_all(way):
  """In the optimised program; the blocks of both loops are many."""
  vocab = 256 if way == "rows" else 32
  arrays = draw(vocab)
  mesh = tiny.mesh(fsdp=4, tensor=2)
  run = outputs_and_grads(token_logprobs, chunk_size=1, vocab_chunk=4)
  with jax.set_mesh(mesh):
    text = run.lower(place(arrays, mesh)).compile().as_text()
  # No collective is in a loop, where it would be repeated.
  loops = set(re.findall(r"body=%?([\w.\-]+)", text))
  assert loops
  for computation in re.split(r"\n(?=\S)", text):
    name = re.match(r"%?([\w.\-]+)", computation)
    if name and name[1] in loops:
      assert not collectives(computation), computation[:200]
  moved = collectives(text)
  head, hidden = D * vocab // 2, B * T * D  # of a group of `fsdp`
  # Tokens and other numbers a position are left out.
  moved = [(name, size) for name, size in moved if size > B * T]
  gathers = [size for name, size in moved if name == "all-gather"]
  if way == "rows":
    # Hidden states of policy and reference; heads change places.
    assert gathers == [hidden, hidden]
    assert max(size for _, size in moved) <= hidden
  else:
    # The heads of policy and reference once, for both passes.
    assert gathers == [head, head]
    # The gradient of the head is scattered once.
    assert all(size <= head for _, size in moved)
