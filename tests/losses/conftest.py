"""Arrays of different ranks are never added up by accident in the losses."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def raise_on_rank_promotion():
  before = jax.config.jax_numpy_rank_promotion
  jax.config.update("jax_numpy_rank_promotion", "raise")
  yield
  jax.config.update("jax_numpy_rank_promotion", before)
