"""Looking tokens up in a table that is split over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import tiny

from oreo_jax.models.embedding import embed
from oreo_jax.sharding import BATCH_AXES, shardings_of

B, T = 8, 6
MESHES = [
  {"fsdp": 8},
  {"fsdp": 4, "tensor": 2},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"tensor": 8},
]


# 33 rows and a width of 7 do not divide over any axis.
@pytest.mark.parametrize("vocab, width", [(32, 8), (33, 7)])
@pytest.mark.parametrize("sizes", [{}, *MESHES], ids=str)
def test_equals_the_plain_gather(sizes, vocab, width):
  rng = np.random.default_rng(0)
  table = rng.standard_normal((vocab, width)).astype(np.float32)
  tokens = rng.integers(0, vocab, (B, T)).astype(np.int32)
  weights = rng.standard_normal((B, T, width)).astype(np.float32)
  want = np.zeros((vocab, width))
  np.add.at(want, tokens, weights.astype(np.float64))

  def total(table, tokens):
    rows = embed(table, tokens, jnp.dtype(jnp.float32))
    return jnp.sum(rows * weights), rows

  mesh = tiny.mesh(**sizes)
  place = shardings_of({"x": ("vocab", "embed")}, {"x": table}, mesh)["x"]
  with jax.set_mesh(mesh):
    (_, rows), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(
      jax.device_put(table, place),
      jax.device_put(tokens, NamedSharding(mesh, P(BATCH_AXES))),
    )
  np.testing.assert_array_equal(rows, table[tokens])
  np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)
  assert grad.sharding.is_equivalent_to(place, 2)


def test_rows_that_do_not_divide_are_looked_up_too():
  table = jnp.arange(32.0).reshape(8, 4)
  tokens = jnp.asarray([[1, 7, 3]], jnp.int32)
  with jax.set_mesh(tiny.mesh(fsdp=8)):
    rows = jax.jit(embed, static_argnums=2)(
      table, tokens, jnp.dtype("bfloat16")
    )
  assert rows.dtype == jnp.bfloat16
  np.testing.assert_array_equal(rows.astype(jnp.float32), table[tokens])
