"""A draw without chance, for the library and for plain Python alike."""

import contextlib
import importlib

import jax
import jax.numpy as jnp
import pytest

# log pi of the way at place w is said to be -(w + 1) * LOGP, which floats add
# up exactly.
LOGP = 1 / 8


def way_logp(way):
  return -(way + 1) * LOGP


class Turns:
  """Searches in which proposal j of a text takes the j-th way of every fork.

  They are compiled apart from those of other tests.
  """

  def __init__(self):
    self._grow = importlib.import_module("oreo_jax.decode.grow")
    self._search = importlib.import_module("oreo_jax.decode.search")
    search_round = self._search.search_round.__wrapped__
    self._round = jax.jit(
      lambda *arguments: search_round(*arguments), donate_argnums=1
    )

  @contextlib.contextmanager
  def taken(self, branches):
    """Searches so while in force; a text has this many proposals."""

    def take_turns(keys, positions, logits, sampling, tokens, inside):
      del keys, positions, sampling, tokens, inside
      order = jnp.argsort(-logits, axis=-1)
      ways = jnp.sum(logits > -10.0, axis=-1)
      way = (jnp.arange(logits.shape[0]) % branches) % ways
      drawn = jnp.take_along_axis(order, way[:, None], axis=1)[:, 0]
      return drawn.astype(jnp.int32), way_logp(way.astype(jnp.float32))

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(self._grow, "draw", take_turns)
      patch.setattr(self._search, "search_round", self._round)
      yield
