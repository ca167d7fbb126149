"""What it saves to run frozen layers once a step, or once a training.

    python benchmarks/trunk.py > trunk.json

The shape of SmolLM2-135M with adapters in the last 8 of its 30 layers, 4 rows
of 320 tokens, two sequences a row. Three ways take turns, a step each:
`apart`, every network runs the frozen layers itself; `shared`, they run once;
`stored`, their states come with the batch, as with `train.keep_trunk=True`. The
weights are random, and the losses of the three are compared.

JSON on standard output: all seconds of each way, their median, and that as a
share of the median of `apart`.
"""

import argparse
import json
import statistics
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from oreo_jax import models, train
from oreo_jax.config import (
  Config,
  CriticConfig,
  LoraConfig,
  MeshConfig,
  TrainConfig,
)
from oreo_jax.data import Tokenized, make_loader
from oreo_jax.sharding import make_mesh, shard_batch
from oreo_jax.train import forward

ROWS, SLOTS, PROMPT = 4, 320, 60
WAYS = ("apart", "shared", "stored")


def make_sequences(vocab: int) -> list[Tokenized]:
  """Returns two sequences a row, of random tokens."""
  rng = np.random.default_rng(0)
  # A sequence of n tokens takes n - 1 slots.
  length = SLOTS // 2 + 1
  sequences = []
  for number in range(2 * ROWS):
    actions = np.arange(length) >= PROMPT
    rewards = np.zeros(length, np.float32)
    rewards[-1] = number % 2
    tokens = rng.integers(0, vocab, length).astype(np.int32)
    name = str(number)
    sequences.append(Tokenized(tokens, actions, actions, rewards, name, name))
  return sequences


def measure(objective: str, repeats: int) -> dict:
  """Measures a step of one objective in the three ways."""
  model = models.preset("HuggingFaceTB/SmolLM2-135M-Instruct")
  config = Config(
    model=model,
    critic=CriticConfig(kind="lora"),
    lora=LoraConfig(
      policy=objective == "oreo", rank=16, alpha=32.0, last_layers=8
    ),
    train=TrainConfig(objective=objective, batch_size=ROWS),
  )
  setup = train.make_setup(
    config, train.OBJECTIVES[objective], 100, max_segments=2
  )
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  loader = make_loader(
    make_sequences(model.vocab_size),
    batch_size=ROWS,
    row_length=SLOTS,
    shuffle=False,
  )
  base = jax.jit(lambda key: models.init(key, model))(jax.random.key(0))
  steps, states, batches, losses = {}, {}, {}, {}
  with jax.set_mesh(mesh):
    rows = shard_batch(loader.batch(0), mesh)
    depth = forward.trunk_depth(setup)
    trunk = jax.jit(
      lambda base, rows: forward.run_trunk(base, rows, setup, depth)
    )(base, rows)
    for way in WAYS:
      states[way] = train.init_state(jax.random.key(1), setup, base)
      steps[way] = train.make_train_step(setup, states[way], mesh)
      batches[way] = rows
      if way == "stored":
        extras = {forward.TRUNK: trunk.astype(jnp.bfloat16)}
        batches[way] = rows._replace(extras=extras)

    def take_step(way: str) -> float:
      start = time.perf_counter()
      states[way], metrics = steps[way](states[way], base, batches[way])
      losses[way] = float(metrics["loss"])
      jax.block_until_ready(states[way])
      return time.perf_counter() - start

    # The first call compiles; what `trunk_depth` says then is part of the step.
    with mock.patch.object(forward, "trunk_depth", lambda setup: 0):
      take_step("apart")
    take_step("shared")
    take_step("stored")
    seconds = {way: [] for way in WAYS}
    for number in range(repeats):
      for way in WAYS:
        seconds[way].append(take_step(way))
      print(
        f"{objective}: step {number + 1} of {repeats}",
        file=sys.stderr,
        flush=True,
      )
  medians = {way: statistics.median(s) for way, s in seconds.items()}
  return {
    "objective": objective,
    **{
      way: {
        "seconds": [round(s, 3) for s in seconds[way]],
        "median_s": medians[way],
        "share": medians[way] / medians["apart"],
        "loss": losses[way],
      }
      for way in WAYS
    },
  }


def main() -> None:
  """Reads the arguments, measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--objective", choices=("oreo", "value", "all"), default="all"
  )
  parser.add_argument("--repeats", type=int, default=5)
  arguments = parser.parse_args()
  chosen = arguments.objective
  results = [
    measure(objective, arguments.repeats)
    for objective in (("oreo", "value") if chosen == "all" else (chosen,))
  ]
  print(json.dumps(results, indent=2))
  for result in results:
    losses = [result[way]["loss"] for way in WAYS]
    if not np.allclose(losses, losses[0], rtol=1e-2):
      sys.exit(f"the three ways do not compute the same: {losses}")


if __name__ == "__main__":
  main()
