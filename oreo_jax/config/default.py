"""The config of `oreo generate` where none is named."""

from oreo_jax.config import Config


def get_config() -> Config:
  """Returns a config with nothing set."""
  return Config()
