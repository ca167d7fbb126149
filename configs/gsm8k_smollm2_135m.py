r"""A value function on real trajectories: SmolLM2-135M reads GSM8K answers.

  python scripts/convert_smollm2.py smollm2
  python scripts/convert_gsm8k_solutions.py example_model_solutions.jsonl \
    solutions.jsonl
  oreo train --config=configs/gsm8k_smollm2_135m.py --config.init=smollm2 \
    --config.data.path=solutions.jsonl
  oreo evaluate --config=configs/gsm8k_smollm2_135m.py --config.init=smollm2 \
    --config.data.path=solutions.jsonl

The trajectories are the example model solutions that OpenAI published with
GSM8K (grade-school-math): answers of four models to every problem, which go in
with their calculator annotations as they are. The 780 steps read those to nine
tenths of 1,000 problems one and a half times.

Objective `value`: the policy stays what it is, so its log-ratio is 0, no policy
runs at all, and the target of every state is the reward. The critic is the
frozen base with adapters; there is one copy of the base in memory.

Hardware: CPU, float32, 6 GB. Half an hour of two free cores, and 6 minutes for
the judging. Expected on the held-out problems: AUC 0.69 pooled (length 0.58)
and 0.54 within a problem, which cannot be told from chance;
docs/huggingface.md has the intervals. The paper has no figure for this model.
"""

from oreo_jax.config import (
  Config,
  CriticConfig,
  DataConfig,
  LoraConfig,
  TrainConfig,
)


def get_config() -> Config:
  """Returns the run's settings; name --config.init and --config.data.path."""
  return Config(
    critic=CriticConfig(kind="lora"),
    # Nothing is trained in the first 22 layers, and no gradient computed.
    lora=LoraConfig(rank=16, alpha=32.0, last_layers=8),
    data=DataConfig(
      # Attention over longer rows costs more than the few answers that do not
      # fit are worth; the evaluation takes them all.
      row_length=320,
      on_long="skip",
      held_out=0.1,
      # Settings were chosen on a part of the other problems of this split.
      seed=2,
    ),
    train=TrainConfig(
      objective="value",
      # Of the hundred tokens of an answer most cannot know how it ends. The
      # states between lines and after the last one learn faster.
      granularity="step",
      batch_size=4,
      epochs=2.0,
      max_steps=780,
      critic_lr=1.5e-3,
      # The head reads 576 large features: with the adapters' rate it jumps.
      value_head_lr=1.5e-4,
      warmup=0.05,
      log_every=5,
      measure_every=0,
      checkpoint_every=50,
      keep_checkpoints=1,
    ),
  )
