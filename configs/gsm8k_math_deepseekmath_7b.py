r"""OREO on DeepSeekMath-7B-Instruct, GSM8K and MATH, as in the paper.

  for stage in collect train evaluate report; do
    oreo $stage --config=configs/gsm8k_math_deepseekmath_7b.py \
      --config.init=deepseek-math-7b-instruct --workdir=runs/deepseek_gsm8k
  done

and the same with gsm8k_math_deepseekmath_7b.py:math for MATH. `--config.init`
is a directory with the checkpoint of that name from the Hugging Face Hub. It is
tuned already, and is the paper's SFT row: there is no stage `sft` here. The
mixture of both data sets is made as in gsm8k_math_qwen2p5_1p5b.py.

Paper, accuracy of greedy answers in percent (GSM8K / MATH):
  SFT 82.9 / 46.8   rejection sampling 83.6 / 47.2   OREO 85.9 / 49.2
Not reproduced by this project yet.

Hyper-parameters of the paper: lr 5e-6 for the policy, batch 128, 2 epochs, beta
0.03, alpha 0.01; the critic is the frozen reference with adapters of rank 64,
alpha 64, lr 1e-4. Ours: rows of 2,048 tokens hold several answers, so that
batch 32 of rows is about the paper's 128 answers.

Hardware: the policy, its moments and gradients, and the reference, which is the
critic's trunk as well, are five copies of 7B float32 weights, 140 GB, split
over the chips by `mesh.fsdp`. By `oreo aot`, these settings take 12.1 of 95.7
GiB a chip on a v5p:2x2x4 (16 chips, 2 rows each); with 64 chips of a v5e:8x8
and --config.train.batch_size=128 it is 6.6 of 15.75 GiB. More machines are in
docs/scaling.md. Not run, not measured.
"""

from oreo_jax.config import (
  CollectConfig,
  Config,
  CriticConfig,
  DataConfig,
  EvaluateConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  TaskConfig,
  TrainConfig,
)


def get_config(variant: str = "gsm8k") -> Config:
  """Returns the run's settings; variants: gsm8k, math."""
  # The model's own chat template has no system turn: the question asks.
  ask = (
    "{question}\nPlease reason step by step, and put your final answer within "
    "\\boxed{}."
  )
  options = {"prompt": ask}
  if variant == "gsm8k":
    options["answer_format"] = "boxed"
  return Config(
    task=TaskConfig(name=variant, options=options),
    model=ModelConfig(dtype="bfloat16", remat="full"),
    critic=CriticConfig(kind="lora"),
    lora=LoraConfig(rank=64, alpha=64.0),
    mesh=MeshConfig(data=1, fsdp=-1),
    data=DataConfig(
      chat=True,
      row_length=2048,
      delimiters="lines" if variant == "gsm8k" else "sentences",
      held_out=0.02,
      on_long="skip",
    ),
    collect=CollectConfig(samples=10, max_new_tokens=1024, batch_size=256),
    train=TrainConfig(
      batch_size=32,
      epochs=2.0,
      lr=5e-6,
      critic_lr=1e-4,
      beta=0.03,
      alpha=0.01,
    ),
    evaluate=EvaluateConfig(
      problems=0,
      max_new_tokens=1024,
      max_step_tokens=256,
      batch_size=128,
    ),
  )
