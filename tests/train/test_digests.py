"""Digests of arrays: every bit counts, the mesh does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracles import tiny

from oreo_jax.train.digests import array_digests, fold_bits

KINDS = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"]


def draw(kind, shape=(4, 6), seed=0):
  raw = np.random.default_rng(seed).integers(-100, 100, shape)
  return jnp.asarray(raw % 2 if kind == "bool" else raw).astype(kind)


def mix(x):
  """MurmurHash3's finaliser on Python integers."""
  x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
  x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
  return x ^ (x >> 16)


@pytest.mark.parametrize("kind", [*KINDS, "float64"])
def test_the_sum_is_that_of_plain_integers(kind):
  array = np.asarray(draw(kind if kind != "float64" else "float32"))
  with jax.enable_x64(kind == "float64"):
    array = array.astype(kind)
    folded = jax.jit(fold_bits)(jnp.asarray(array))
  width = min(array.dtype.itemsize, 4)
  bits = np.frombuffer(array.tobytes(), f"<u{width}").tolist()
  for seed, total in zip((0x9E3779B1, 0x85EBCA77), folded, strict=True):
    want = sum(
      mix(word ^ mix((place + seed) & 0xFFFFFFFF))
      for place, word in enumerate(bits)
    )
    assert int(total) == want % 2**32


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_changes_it(kind):
  array = np.array(draw(kind))
  before = array_digests({"x": array})
  width = 1 if kind == "bool" else 8 * array.dtype.itemsize
  for place in (0, 7, array.size - 1):
    for bit in range(width):
      content = bytearray(array.tobytes())
      content[place * array.dtype.itemsize + bit // 8] ^= 1 << (bit % 8)
      other = np.frombuffer(bytes(content), array.dtype).reshape(array.shape)
      assert array_digests({"x": other}) != before


def test_so_do_places_shapes_types_and_names():
  x = draw("float32")
  trees = [
    {"x": x},
    {"y": x},
    {"x": x[::-1]},
    {"x": x.T},
    {"x": x.reshape(-1)},
    {"x": jax.lax.bitcast_convert_type(x, jnp.int32)},
    {"x": -x},
    {"x": jnp.zeros_like(x)},
    {"x": -jnp.zeros_like(x)},
  ]
  assert len({str(array_digests(tree)) for tree in trees}) == len(trees)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_it_is_the_same_on_any_mesh(kind):
  x = draw(kind, (8, 16))
  before = array_digests({"x": x})
  for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    for spec in ((), ("fsdp",), (None, "tensor"), ("fsdp", "tensor")):
      sharding = NamedSharding(tiny.mesh(**sizes), PartitionSpec(*spec))
      placed = jax.device_put(x, sharding)
      assert array_digests({"x": placed}) == before, (sizes, spec)


def test_what_it_says():
  assert array_digests({"a": {"b": jnp.zeros((0, 3), jnp.bfloat16)}}) == {
    "['a']['b']": "bfloat16[0,3] 0000000000000000"
  }


def test_many_sharded_arrays_do_not_wait_for_each_other():
  # Started all at once, these ended the process after 40 s, with XLA's
  # "Termination timeout" of an all-reduce.
  sharding = NamedSharding(
    tiny.mesh(fsdp=4, tensor=2), PartitionSpec(None, "fsdp", "tensor")
  )
  x = jax.device_put(np.ones((2, 64, 64), np.float32), sharding)
  tree = {str(number): x for number in range(300)}
  assert len(set(array_digests(tree).values())) == 1
