"""A run so small that a test can afford all its stages."""

from oreo_jax.config import (
  CollectConfig,
  CompareConfig,
  Config,
  DataConfig,
  EvaluateConfig,
  ModelConfig,
  SftConfig,
  TaskConfig,
  TrainConfig,
)

# So easy that a policy of one layer is right now and then after a few steps:
# otherwise there is nothing to learn from.
TASK = {
  "size": 3,
  "walls": 1,
  "min_path": 1,
  "max_path": 2,
  "max_moves": 3,
  "line_format": "cell",
}
TINY_MODEL = ModelConfig(
  embed_dim=16,
  num_layers=1,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=32,
)


def tiny_run(**changes) -> Config:
  """A few steps of a model of one layer; `changes` replace whole sections."""
  sections = {
    "task": TaskConfig(name="maze", options=TASK),
    "model": TINY_MODEL,
    # So young a policy now and then answers with nothing but line breaks.
    "data": DataConfig(row_length=24, held_out=0.0, on_error="skip"),
    "sft": SftConfig(examples=64, batch_size=16, epochs=20.0, lr=1e-2),
    "collect": CollectConfig(
      problems=24, samples=8, max_new_tokens=10, batch_size=64
    ),
    "train": TrainConfig(batch_size=16, max_steps=2, lr=1e-3, critic_lr=1e-3),
    "evaluate": EvaluateConfig(
      problems=12, max_new_tokens=10, max_step_tokens=4, batch_size=64
    ),
    "compare": CompareConfig(),
  }
  return Config(**{**sections, **changes})
