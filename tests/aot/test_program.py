"""Programs are made from the config: of steps that read what is stored too."""

import dataclasses

from oracles import tiny

from oreo_jax.aot.program import train_program
from oreo_jax.config import (
  Config,
  CriticConfig,
  DataConfig,
  LoraConfig,
  TrainConfig,
)
from oreo_jax.train.forward import REF_LOGPS, TRUNK


def test_a_step_reads_the_stored_reference_and_the_kept_trunk():
  config = Config(
    model=dataclasses.replace(tiny.MODEL),
    critic=CriticConfig(kind="lora"),
    lora=LoraConfig(policy=True, rank=2, last_layers=1),
    data=DataConfig(row_length=16),
    train=TrainConfig(
      batch_size=4, kl="k3", reference="stored", keep_trunk=True
    ),
  )
  config.validate()
  program = train_program(config, tiny.mesh())
  extras = program.arguments["batch"].extras
  assert extras[REF_LOGPS].shape == (4, 16)
  assert extras[TRUNK].shape == (4, 16, tiny.MODEL.embed_dim)
  program.lower()
