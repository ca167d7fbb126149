"""What it saves a search that policy and critic have first layers in common.

    python benchmarks/shared_search.py > shared_search.json

A policy, and a value network that differs from it in the last layers alone, as
LoRA with `lora.last_layers` leaves them. Two ways take turns, a step beam
search each: `apart`, the value network is a whole one; `shared`, it goes on
from what the policy's first layers said (`models.share_trunk`). The weights are
random; one token in sixteen ends a step, so that steps are of many lengths.

JSON on standard output: all seconds of each way, their median, that as a share
of the median of `apart`, and the bytes that the value network holds: its own
weights, and its caches in all slots.
"""

import argparse
import json
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
from ways import take_turns

from oreo_jax import decode, models
from oreo_jax.config import ModelConfig
from oreo_jax.decode.search import start_slots

# (architecture, layers that are the value network's own).
SIZES = {
  "small": (
    ModelConfig(
      vocab_size=1024,
      embed_dim=256,
      num_layers=8,
      num_heads=8,
      num_kv_heads=4,
      head_dim=32,
      mlp_dim=768,
    ),
    2,
  ),
  "smollm2": (models.preset("HuggingFaceTB/SmolLM2-135M-Instruct"), 8),
}
WAYS = ("apart", "shared")
QUESTIONS, PROMPT, ANSWER = 8, 64, 96
STRATEGY = decode.Strategy(beams=4, max_steps=4, max_step_tokens=32)


def draw_networks(config: ModelConfig, own: int):
  """Returns a policy, and a value network with `own` other last layers."""
  policy = models.init(jax.random.key(0), config)
  critic = models.init(jax.random.key(1), config, head="value")
  depth = config.num_layers - own
  critic["layers"] = jax.tree.map(
    lambda x, y: jnp.concatenate([x[:depth], y[depth:]]),
    policy["layers"],
    critic["layers"],
  )
  critic["embedding"] = policy["embedding"]
  head = jax.random.normal(jax.random.key(2), critic["value_head"].shape)
  return policy, {**critic, "value_head": head}


def size(tree) -> int:
  """Returns the bytes of a tree of arrays."""
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def measure(name: str, repeats: int) -> dict:
  """Measures both ways on a model of one size."""
  config, own = SIZES[name]
  policy, critic = draw_networks(config, own)
  rng = np.random.default_rng(0)
  prompts = rng.integers(1, config.vocab_size, (QUESTIONS, PROMPT), np.int32)
  ends = np.arange(config.vocab_size) % 16 == 1
  stops = decode.Stops(ends.astype(np.int8)[None])
  critics = {"apart": critic, "shared": models.share_trunk(critic, policy)}
  plans = {
    way: decode.make_plan(
      policy,
      critics[way],
      jax.random.key(3),
      config,
      strategy=STRATEGY,
      stops=stops,
      eos_ids=(0,),
      max_new_tokens=ANSWER,
    )
    for way in WAYS
  }

  def searching(plan: decode.Plan):
    return lambda: decode.search(plan, prompts, slots=QUESTIONS)

  seconds, found = take_turns(
    name, {way: searching(plan) for way, plan in plans.items()}, repeats
  )
  apart, shared = (found[way] for way in WAYS)
  result = {
    "size": name,
    "layers": config.num_layers,
    "shared_layers": plans["shared"].shared_layers,
    "tokens_proposed": int(apart.proposed.sum()),
    "same_answers": np.array_equal(apart.answers.tokens, shared.answers.tokens),
    "values_differ_by": float(np.abs(apart.values - shared.values).max()),
  }
  for way in WAYS:
    median = statistics.median(seconds[way])
    state = start_slots(plans[way], slots=QUESTIONS, room=PROMPT)
    result[way] = {
      "seconds": [round(s, 3) for s in seconds[way]],
      "median_s": median,
      "share": median / statistics.median(seconds["apart"]),
      "critic_weights_bytes": size(plans[way].critic),
      "critic_cache_bytes": size((state.critic_prompts, state.critic_cache)),
    }
  return result


def main() -> None:
  """Reads the arguments, measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=(*SIZES, "all"), default="all")
  parser.add_argument("--repeats", type=int, default=5)
  arguments = parser.parse_args()
  names = SIZES if arguments.size == "all" else (arguments.size,)
  results = [measure(name, arguments.repeats) for name in names]
  print(json.dumps(results, indent=2))
  if not all(result["same_answers"] for result in results):
    sys.exit("the two ways do not find the same answers")


if __name__ == "__main__":
  main()
