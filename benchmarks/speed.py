"""How fast this machine trains, samples and searches: `make bench`.

Random weights and random tokens of the shapes of the maze task; the first call
of each part (compilation) is timed on its own. Figures are the median of
several calls.
"""

import statistics
import time

import jax
import numpy as np

from oreo_jax import decode, models, sharding, train
from oreo_jax.config import Config
from oreo_jax.data.packing import Batch

VOCAB = 64
ROWS, SLOTS = 64, 64  # of a training batch
PROMPT, ANSWER = 32, 32  # tokens
PROMPTS, BEAMS = 256, 4
REPEATS = 5


def timed(call):
  """Returns (seconds of the first call, median seconds of the next ones)."""
  seconds = []
  for _ in range(REPEATS + 1):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  return seconds[0], statistics.median(seconds[1:])


def random_batch(rng):
  """Rows of one sequence each, the second half of it the answer."""
  tokens = rng.integers(1, VOCAB, (ROWS, SLOTS + 1), dtype=np.int32)
  positions = np.broadcast_to(np.arange(SLOTS, dtype=np.int32), (ROWS, SLOTS))
  answer = positions >= SLOTS // 2
  rewards = np.zeros((ROWS, SLOTS), np.float32)
  rewards[:, -1] = rng.integers(0, 2, ROWS)
  return Batch(
    tokens=tokens[:, :-1],
    targets=tokens[:, 1:],
    positions=positions,
    segment_ids=np.ones((ROWS, SLOTS), np.int32),
    action_mask=answer,
    decision_mask=answer,
    rewards=rewards,
  )


def time_training(config, objective, rng):
  """Times a train step; tokens are slots of the batch."""
  setup = train.make_setup(config, train.OBJECTIVES[objective], num_steps=100)
  mesh = sharding.make_mesh(config.mesh)
  ref = models.init(jax.random.key(0), setup.model)
  state = train.init_state(jax.random.key(1), setup, ref)
  state = jax.device_put(state, train.state_shardings(setup, state, mesh))
  step = train.make_train_step(setup, state, mesh)
  batch = sharding.shard_batch(random_batch(rng), mesh)

  def call():
    nonlocal state
    state, metrics = step(state, ref, batch)
    return metrics

  with jax.set_mesh(mesh):
    return (*timed(call), ROWS * SLOTS)


def time_sampling(config, rng):
  """Times generation with a cache; no token ends an answer early."""
  policy = models.init(jax.random.key(0), config.model)
  prompts = rng.integers(1, VOCAB, (PROMPTS, PROMPT), dtype=np.int32)

  def call():
    return decode.generate(
      policy,
      prompts,
      jax.random.key(2),
      config.model,
      max_new_tokens=ANSWER,
      eos_ids=(0,),
    ).tokens

  first, median = timed(call)
  return first, median, int((call() > 0).sum())


def time_search(config, rng):
  """Times step beam search; one token in eight ends a step."""
  policy = models.init(jax.random.key(0), config.model)
  critic = models.init(jax.random.key(1), config.model, head="value")
  prompts = rng.integers(1, VOCAB, (PROMPTS // 8, PROMPT), dtype=np.int32)
  # One state, and one token in eight ends a step.
  stops = decode.Stops((np.arange(VOCAB) % 8 == 1).astype(np.int8)[None])
  proposed = 0

  def call():
    nonlocal proposed
    search = decode.step_beam_search(
      policy,
      critic,
      prompts,
      jax.random.key(2),
      config.model,
      stops=stops,
      eos_ids=(0,),
      max_new_tokens=ANSWER,
      beams=BEAMS,
      max_step_tokens=16,
    )
    proposed = int(search.proposed.sum())
    return search.values

  first, median = timed(call)
  return first, median, proposed


def main():
  """Prints a line a part."""
  config = Config()
  config.model.vocab_size = VOCAB
  config.model.unroll = config.model.num_layers
  config.sft.batch_size = config.train.batch_size = ROWS
  rng = np.random.default_rng(0)
  kind = jax.devices()[0].device_kind
  print(f"jax {jax.__version__}, {jax.device_count()} device(s): {kind}")
  print(f"{'':<12}{'first s':>10}{'then s':>10}{'tokens/s':>12}")
  for name, (first, then, tokens) in (
    ("SFT step", time_training(config, "sft", rng)),
    ("OREO step", time_training(config, "oreo", rng)),
    ("sampling", time_sampling(config, rng)),
    ("step beam", time_search(config, rng)),
  ):
    print(f"{name:<12}{first:>10.2f}{then:>10.3f}{tokens / then:>12,.0f}")


if __name__ == "__main__":
  main()
