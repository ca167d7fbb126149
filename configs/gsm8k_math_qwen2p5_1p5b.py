r"""OREO on Qwen2.5-Math-1.5B, GSM8K and MATH, as in the paper (A.2, A.3).

  oreo run --config=configs/gsm8k_math_qwen2p5_1p5b.py \
    --config.init=Qwen2.5-Math-1.5B --workdir=runs/qwen_gsm8k
  oreo run --config=configs/gsm8k_math_qwen2p5_1p5b.py:math \
    --config.init=Qwen2.5-Math-1.5B --workdir=runs/qwen_math

`--config.init` is a directory with the checkpoint of that name from the Hugging
Face Hub. The paper trains one model on both data sets; a run here has one task.
For the mixture collect with both variants, join the two files of trajectories
and train with `oreo train --config.data.path=FILE`.

Paper, accuracy of greedy answers in percent (GSM8K / MATH):
  SFT 73.5 / 47.5   rejection sampling 74.9 / 50.3   OREO 77.3 / 52.5
and with beam search over steps, B=7, +11.4% (GSM8K) and +17.9% (MATH500)
relative to greedy. Not reproduced by this project yet.

Hyper-parameters of the paper: SFT lr 2e-5, 3 epochs; 10 samples a problem at
temperature 1; lr 5e-6 for policy and critic, batch 128, 1 epoch, beta 0.03,
alpha 0.01, cosine decay to 0 after 3% of warm-up; the critic is a network of
its own. Ours: rows of 2,048 tokens hold several answers, so that batch 32 of
rows is about the paper's 128 answers.

Hardware: policy, critic, their moments and gradients, and the reference are
nine copies of 1.5B float32 weights, 56 GB, split over the chips by `mesh.fsdp`.
By `oreo aot`, a step of 128 rows with --config.train.grad_accum=2 takes 7.1 of
15.75 GiB a chip on a v5e-16, and 2.3 s at least; more machines are in
docs/scaling.md. For more chips add --config.mesh.data. Not run, not measured.
"""

from oreo_jax.config import (
  CollectConfig,
  Config,
  CriticConfig,
  DataConfig,
  EvaluateConfig,
  MeshConfig,
  ModelConfig,
  SftConfig,
  TaskConfig,
  TrainConfig,
)


def get_config(variant: str = "gsm8k") -> Config:
  """Returns the run's settings; variants: gsm8k, math."""
  # The model's own chat template asks for the answer in \\boxed{}.
  options = {"prompt": "{question}"}
  if variant == "gsm8k":
    options["answer_format"] = "boxed"
  return Config(
    task=TaskConfig(name=variant, options=options),
    model=ModelConfig(dtype="bfloat16", remat="full"),
    critic=CriticConfig(kind="separate"),
    mesh=MeshConfig(data=1, fsdp=-1),
    data=DataConfig(
      chat=True,
      row_length=2048,
      delimiters="lines" if variant == "gsm8k" else "sentences",
      held_out=0.02,
      on_long="skip",
    ),
    sft=SftConfig(batch_size=32, epochs=3.0, lr=2e-5),
    collect=CollectConfig(samples=10, max_new_tokens=1024, batch_size=512),
    train=TrainConfig(
      batch_size=32,
      epochs=1.0,
      lr=5e-6,
      critic_lr=5e-6,
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
