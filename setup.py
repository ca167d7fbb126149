"""Package description. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"


def read_version() -> str:
  """Reads the version without importing the package."""
  text = (HERE / "oreo_jax" / "__init__.py").read_text(encoding="utf-8")
  return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


# Lower bounds only, and no accelerator: which backend jax gets is the choice
# of the machine, so it is an extra ([tpu], [cuda]) and never a requirement.
REQUIRED = [
  "absl-py>=2.3",
  "datasets>=5.0",
  "flax>=0.12.8",
  "jax>=0.10.1",
  "jinja2>=3.1.6",
  "matplotlib>=3.10",
  "ml_collections>=1.1",
  "numpy>=2.0",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12",
  "safetensors>=0.8",
  "scipy>=1.15",
  "tensorboardX>=2.6.4",
  "tokenizers>=0.23.1",
  "tqdm>=4.67",
  "transformers>=5.20",
]
MATH = ["math-verify[antlr4-13-2]>=0.9"]
TEST = [
  "equinox>=0.13",
  "hypothesis>=6.130",
  "pytest>=9.0",
  "pytest-xdist>=3.8",
  *MATH,
]

setup(
  name="oreo_jax",
  version=read_version(),
  description="Offline multi-step reasoning with OREO, in JAX",
  long_description=README.read_text("utf-8") if README.exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=find_packages(include=["oreo_jax", "oreo_jax.*"]),
  package_data={"oreo_jax.report": ["templates/*"]},
  python_requires=">=3.11",
  install_requires=REQUIRED,
  extras_require={
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    # The compiler alone, which needs no TPU: for `oreo aot`.
    "aot": ["libtpu"],
    "math": MATH,
    "test": TEST,
    "dev": [*TEST, "mypy>=1.15", "pre-commit>=4.0", "ruff>=0.14"],
  },
  entry_points={"console_scripts": ["oreo = oreo_jax.cli:main"]},
  classifiers=[
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
