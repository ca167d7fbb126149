"""Expressions over plain integers, one operation a line.

Closer to the paper's setting than the maze: the verifier sees the final number
alone, and a slip anywhere on the way spoils it.

  oreo run --config=configs/arithmetic.py --workdir=runs/arithmetic
  oreo compare --config=configs/arithmetic.py:easy

Expected of the comparison, 1,000 test problems, three seeds: SFT 15%, rejection
sampling 34%, OREO 32%, DQO 37% (docs/comparison.md).
"""

from oreo_jax.config import (
  CollectConfig,
  CompareConfig,
  Config,
  DataConfig,
  EvaluateConfig,
  MethodConfig,
  ModelConfig,
  SftConfig,
  TaskConfig,
  TrainConfig,
)


def get_config(variant: str = "default") -> Config:
  """Returns the run's settings; variants: default, easy, hard."""
  # Two answers a row; of the hard ones one.
  lengths = {"easy": (40, 96), "hard": (64, 96)}
  new_tokens, row_length = lengths.get(variant, (50, 128))
  return Config(
    task=TaskConfig(
      name="arithmetic",
      # Carrying and forgetting to are as likely. With the task's own 0.25 the
      # right way is the teacher's commonest, and greedy decoding finds it
      # without any training.
      options={"variant": variant, "forget": 0.5},
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
    data=DataConfig(row_length=row_length, held_out=0.05),
    sft=SftConfig(examples=20_000, batch_size=32, epochs=4.0, lr=3e-3),
    collect=CollectConfig(
      problems=12_000, skip=20_000, samples=4, max_new_tokens=new_tokens
    ),
    train=TrainConfig(
      batch_size=32,
      epochs=3.0,
      lr=1e-3,
      critic_lr=3e-3,
      beta=0.03,
      alpha=0.01,
    ),
    evaluate=EvaluateConfig(
      max_new_tokens=new_tokens, max_step_tokens=16, top_p=0.95
    ),
    # Three rates each, about where the best lay on the maze; step and response
    # level go by the token level's.
    compare=CompareConfig(
      share=1 / 3,
      rounds=1,
      rejection=MethodConfig(lr_scales=(0.3, 1.0, 3.0)),
      dpo=MethodConfig(lr_scales=(0.003, 0.01, 0.03)),
      kto=MethodConfig(lr_scales=(0.001, 0.003, 0.01)),
      dqo=MethodConfig(lr_scales=(0.03, 0.1, 0.3)),
      oreo_token=MethodConfig(lr_scales=(0.3, 1.0, 3.0)),
      oreo_step=MethodConfig(lr_scales=(1.0,)),
      oreo_response=MethodConfig(lr_scales=(1.0,)),
    ),
  )
