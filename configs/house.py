"""Finding things in a room and using them: the embedded task for agents.

oreo run --config=configs/house.py --workdir=runs/house
"""

from oreo_jax.config import (
  AgentConfig,
  CollectConfig,
  Config,
  DataConfig,
  EvaluateConfig,
  ModelConfig,
  SftConfig,
  TaskConfig,
  TrainConfig,
)


def get_config() -> Config:
  """Returns the run's settings."""
  return Config(
    task=TaskConfig(name="house"),
    agent=AgentConfig(
      max_action_tokens=8, max_prompt_tokens=64, max_tokens=256
    ),
    model=ModelConfig(
      embed_dim=64,
      num_layers=4,
      num_heads=4,
      num_kv_heads=4,
      head_dim=16,
      mlp_dim=256,
      unroll=4,
    ),
    data=DataConfig(chat=True, row_length=256, held_out=0.05),
    sft=SftConfig(examples=4_000, batch_size=16, epochs=3.0, lr=3e-3),
    collect=CollectConfig(
      problems=1_500, skip=4_000, samples=4, batch_size=128
    ),
    train=TrainConfig(
      batch_size=16,
      epochs=2.0,
      lr=1e-3,
      critic_lr=3e-3,
      beta=0.03,
      alpha=0.01,
    ),
    evaluate=EvaluateConfig(problems=300, budgets=(1, 3, 5, 7), batch_size=128),
  )
