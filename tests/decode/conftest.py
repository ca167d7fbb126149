"""Quick compilation, and no arrays of different ranks added up by accident."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def _compile_quickly():
  # These tests compile much and compute little.
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="package")
def _raise_on_rank_promotion():
  before = jax.config.jax_numpy_rank_promotion
  jax.config.update("jax_numpy_rank_promotion", "raise")
  yield
  jax.config.update("jax_numpy_rank_promotion", before)
