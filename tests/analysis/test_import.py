"""Results are read and shown on machines without an accelerator, at once."""

import subprocess
import sys

import pytest

CODE = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
  importlib.import_module(module.name)
print([name for name in ("jax", "flax", "optax") if name in sys.modules])
"""


@pytest.mark.parametrize("package", ["oreo_jax.analysis", "oreo_jax.report"])
def test_analysis_and_report_do_not_import_jax(package):
  command = [sys.executable, "-c", CODE, package]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
