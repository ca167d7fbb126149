"""The losses stand alone: jax and numpy, quickly imported."""

import subprocess
import sys

import pytest

PROBE = """
import sys, time
import jax, numpy
known = set(sys.modules)
begin = time.perf_counter()
import oreo_jax.losses
seconds = time.perf_counter() - begin
new = {name.split(".")[0] for name in set(sys.modules) - known}
print(seconds, *sorted(new - set(sys.stdlib_module_names)))
"""

# What the rest of the package needs. `None` makes an import of it fail, as if
# it were not installed.
BLOCK = """
import sys
for name in (
  "absl", "datasets", "flax", "ml_collections", "optax", "orbax", "scipy",
  "tokenizers", "torch", "transformers",
):
  sys.modules[name] = None
"""
USE = """
import jax.numpy as jnp
import oreo_jax

one, mask = jnp.ones((1, 1)), jnp.ones((1, 1), bool)
losses = oreo_jax.losses
out = losses.token_logprobs(jnp.ones((1, 1, 1)), jnp.ones((1, 2)), 0 * mask)
loss = losses.oreo_loss(
  -one, -2 * one, 0.5 * one, one, mask, mask, beta=1.0, kl=out.kl
)
print(float(loss.total))
"""


def run(code):
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_import_pulls_in_jax_and_numpy_alone():
  seconds, *new = run(PROBE)
  # Beyond jax and its own dependencies, only this package is new.
  assert new == ["oreo_jax"]
  # jax itself takes a second; ours on top of it may take little.
  assert float(seconds) < 0.5


def test_a_loss_is_computed_where_nothing_else_is_installed():
  assert run(BLOCK + USE) == ["0.5"]


def test_the_package_itself_imports_nothing():
  code = "import sys; import oreo_jax; print(*sys.modules)"
  loaded = {name.split(".")[0] for name in run(code)}
  assert not loaded & {"jax", "numpy", "flax"}


def test_a_missing_module_is_an_attribute_error():
  import oreo_jax

  assert "losses" in dir(oreo_jax)
  with pytest.raises(AttributeError, match="no attribute 'gains'"):
    oreo_jax.gains  # noqa: B018
