"""How fast this machine samples and searches: `make bench`.

Random weights and random tokens of the shapes of the maze task; the first call
of each part (compilation) is timed on its own. Figures are the median of
several calls. The training step has a benchmark of its own, `train_step.py`.
"""

import statistics
import time

import jax
import numpy as np

from oreo_jax import decode, models
from oreo_jax.config import Config

VOCAB = 64
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
  rng = np.random.default_rng(0)
  kind = jax.devices()[0].device_kind
  print(f"jax {jax.__version__}, {jax.device_count()} device(s): {kind}")
  print(f"{'':<12}{'first s':>10}{'then s':>10}{'tokens/s':>12}")
  for name, (first, then, tokens) in (
    ("sampling", time_sampling(config, rng)),
    ("step beam", time_search(config, rng)),
  ):
    print(f"{name:<12}{first:>10.2f}{then:>10.3f}{tokens / then:>12,.0f}")


if __name__ == "__main__":
  main()
