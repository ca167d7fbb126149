"""Which candidates of a search say the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Bases of two polynomial hashes modulo 2^32. Together they tell apart any two
# of the few texts of a question but once in about 2^64 pairs.
_BASES = (0x9E3779B1, 0x85EBCA77)


def extend_hashes(
  hashes: jax.Array, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
  """Returns the hashes of texts that grew.

  The hash of a text is made token by token, so it does not depend on where the
  text was cut into steps.

  Args:
    hashes: u32[R, 2], of the texts before.
    tokens: i32[R, M], the new tokens.
    lengths: i32[R], how many of them.

  Returns:
    u32[R, 2].
  """
  bases = jnp.asarray(_BASES, jnp.uint32)

  def append(
    hashes: jax.Array, column: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    token, inside = column
    # Plus one: a text and the same text behind tokens 0 are two texts.
    longer = hashes * bases[None] + (token + 1).astype(jnp.uint32)[:, None]
    return jnp.where(inside[:, None], longer, hashes), None

  inside = jnp.arange(tokens.shape[1])[:, None] < lengths[None]
  return jax.lax.scan(append, hashes, (tokens.T, inside))[0]


def is_repeated(
  hashes: jax.Array, alive: jax.Array, questions: int
) -> jax.Array:
  """Marks candidates whose text an earlier live one of the question has.

  Args:
    hashes: u32[R, 2], question-major.
    alive: bool[R]; the others have no text.
    questions: how many questions share the R rows.

  Returns:
    bool[R].
  """
  hashes = hashes.reshape(questions, -1, 2)
  same = jnp.all(hashes[:, :, None] == hashes[:, None, :], axis=-1)
  count = same.shape[-1]
  earlier = jnp.tril(jnp.ones((count, count), bool), -1)
  alive = alive.reshape(questions, 1, -1)
  return jnp.any(same & earlier[None] & alive, axis=2).reshape(-1)
