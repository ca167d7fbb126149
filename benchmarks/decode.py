"""Decoding: greedy against transformers, and slots that are refilled or not.

    python benchmarks/decode.py > decode.json

`greedy` decodes batches of 1, 8 and 32 prompts of 64 tokens, 64 new ones each,
in float32, with the shape of SmolLM2-135M and random weights, by oreo_jax and,
where torch is installed, by transformers' `generate`. Each side is a process of
its own and they take turns. Beside the times stands what bounds them here: the
products of the same weights alone, for the prompts and for a token, and how
fast the weights are read.

`collection` answers 256 prompts, 8 samples each, whose lengths have a long
tail, with slots that are refilled, and with static batches: the same slots,
refilled when all of them are free. Both give the same answers. It does so with
the shape of the demo's policy, in which a step is so short that what surrounds
it counts, and with one of five million weights.

The result is JSON on standard output. Run it on an idle machine; see
docs/performance.md.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

from sides import Side, answers
from ways import take_turns

BATCHES = (1, 8, 32)
PROMPT, NEW = 64, 64
SHAPE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def model_config(size: str):
  """Returns the architecture of a size."""
  from oreo_jax import models

  name = {"smollm2": SHAPE, "tiny": "tiny-llama"}[size]
  return models.preset(
    name,
    vocab_size=49_152 if size == "smollm2" else 64,
    tie_embeddings=True,
    dtype="float32",
    param_dtype="float32",
  )


def prompts_of(batch: int, vocab: int):
  """Returns i32[batch, PROMPT], the same for both sides."""
  import numpy as np

  rng = np.random.default_rng(batch)
  return rng.integers(3, vocab, (batch, PROMPT), dtype=np.int32)


def make_ours(folder: str):
  """Returns what oreo_jax does for a request of a kind and a batch."""
  import jax
  import jax.numpy as jnp

  from oreo_jax import decode, models

  params, config = models.load_hf(
    folder, dtype="float32", param_dtype="float32"
  )
  apart, config = models.unstack_layers(params, config)

  def generate(batch: int):
    out = decode.generate(
      apart,
      prompts_of(batch, config.vocab_size),
      jax.random.key(0),
      config,
      max_new_tokens=NEW,
      eos_ids=(),
      sampler=decode.GREEDY,
    )
    return out.tokens.tolist()

  @jax.jit
  def multiply(layers, table, x):
    """Runs x [D, rows] through the matrices, each the first of its product."""
    for layer in layers:
      q, k, v, gate, up = (
        layer[name]["kernel"].reshape(-1, config.embed_dim)
        for name in ("q", "k", "v", "gate", "up")
      )
      o, down = (
        layer[name]["kernel"].reshape(config.embed_dim, -1)
        for name in ("o", "down")
      )
      # Every product counts in the result, so that none is left out.
      y = q @ x + jnp.sum(k @ x) * 1e-9 + jnp.sum(v @ x) * 1e-9
      x = x + o @ y
      x = x + down @ ((gate @ x) * (up @ x))
    if table is not None:
      x = x + jnp.sum(table @ x) * 1e-9
    return x

  def products(rows: int, head: bool):
    x = jnp.ones((config.embed_dim, rows), jnp.float32) * 1e-3
    table = params["embedding"] if head else None
    return multiply(apart["layers"], table, x).block_until_ready()

  @jax.jit
  def read(tree):
    return sum(jnp.sum(x) for x in jax.tree.leaves(tree))

  requests = {
    "generate": generate,
    "prompt products": lambda batch: products(batch * PROMPT, False),
    "token products": lambda batch: products(batch, True),
    "read weights": lambda unused: read(apart).block_until_ready(),
  }
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  return {"weight_bytes": size}, requests


def make_theirs(folder: str):
  """Returns what transformers does for a request of a kind and a batch."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()

  def generate(batch: int):
    tokens = torch.tensor(
      prompts_of(batch, model.config.vocab_size), dtype=torch.long
    )
    out = model.generate(
      tokens,
      attention_mask=torch.ones_like(tokens),
      max_new_tokens=NEW,
      min_new_tokens=NEW,
      do_sample=False,
      pad_token_id=0,
    )
    return out[:, PROMPT:].tolist()

  return {}, {"generate": generate}


def serve(side: str, folder: str, threads: int) -> None:
  """Is the process of a side."""
  answer = answers(threads)
  if side == "transformers":
    import torch

    torch.set_num_threads(threads)
  facts, requests = {"oreo_jax": make_ours, "transformers": make_theirs}[side](
    folder
  )
  answer(**facts)
  for line in sys.stdin:
    kind, batch = json.loads(line)
    start = time.perf_counter()
    result = requests[kind](batch)
    seconds = time.perf_counter() - start
    answer(seconds=seconds, result=result if isinstance(result, list) else None)


def measure_greedy(size: str, repeats: int, threads: int) -> dict:
  """Measures greedy decoding, all sides in turns."""
  from oreo_jax import models

  config = model_config(size)
  with tempfile.TemporaryDirectory() as home:
    folder = str(pathlib.Path(home) / "model")
    import jax

    models.save_hf(folder, models.init(jax.random.key(0), config), config)
    names = ["oreo_jax"]
    try:
      import torch  # noqa: F401

      names.append("transformers")
    except ImportError:
      say("torch is not installed: only oreo_jax is measured")
    sides = {n: Side(n, __file__, folder, str(threads)) for n in names}
  try:
    return {
      "size": size,
      "prompt": PROMPT,
      "new_tokens": NEW,
      **sides["oreo_jax"].facts,
      "batches": [measure_batch(sides, batch, repeats) for batch in BATCHES],
    }
  finally:
    for side in sides.values():
      side.close()


def measure_batch(sides: dict, batch: int, repeats: int) -> dict:
  """Measures one batch size."""
  bounds = ("prompt products", "token products", "read weights")
  work = {
    **{name: (side, "generate") for name, side in sides.items()},
    **{kind: (sides["oreo_jax"], kind) for kind in bounds},
  }
  seconds = {name: [] for name in work}
  tokens = {}
  for turn in range(repeats + 1):
    for name, (side, kind) in work.items():
      # The threads of the other side spin a little before they sleep.
      time.sleep(0.3)
      # A side that has waited finds the caches full of another's data.
      answer = [side.ask(json.dumps([kind, batch])) for _ in range(2)][1]
      if kind == "generate":
        tokens[name] = answer["result"]
      if turn:
        seconds[name].append(answer["seconds"])
    say(f"batch {batch}: turn {turn} of {repeats}")
  median = {name: statistics.median(s) for name, s in seconds.items()}
  # What products alone take for the same tokens, the prompt's last one among
  # those that are fed.
  least = median["prompt products"] + NEW * median["token products"]
  result = {
    "batch": batch,
    "sides": {
      name: {
        "seconds": [round(s, 4) for s in seconds[name]],
        "tokens_per_s": batch * NEW / median[name],
      }
      for name in sides
    },
    "bounds_ms": {kind: median[kind] * 1e3 for kind in bounds},
    "share_of_products": least / median["oreo_jax"],
  }
  if "transformers" in sides:
    ours, theirs = (tokens[name] for name in ("oreo_jax", "transformers"))
    result["speed_ratio"] = median["transformers"] / median["oreo_jax"]
    result["first_tokens_equal"] = all(
      a[0] == b[0] for a, b in zip(ours, theirs, strict=True)
    )
    pairs = [
      (x, y)
      for a, b in zip(ours, theirs, strict=True)
      for x, y in zip(a, b, strict=True)
    ]
    result["tokens_equal"] = sum(x == y for x, y in pairs) / len(pairs)
  return result


def collection_shapes(size: str) -> dict:
  """Returns architectures by their names."""
  from oreo_jax.config import Config, ModelConfig

  if size == "tiny":
    return {"tiny": ModelConfig()}
  demo = Config().model
  small = dataclasses.replace(
    demo,
    num_layers=6,
    embed_dim=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=768,
  )
  return {"demo": demo, "small": small}


def measure_collection(few: bool, shape, repeats: int) -> dict:
  """Measures answers whose lengths have a long tail, refilled and static."""
  import jax
  import numpy as np

  from oreo_jax import decode, models

  config = dataclasses.replace(shape, vocab_size=64)
  policy, config = models.unstack_layers(
    models.init(jax.random.key(0), config), config
  )
  prompts, samples, slots = (12, 2, 4) if few else (256, 8, 64)
  rng = np.random.default_rng(0)
  # Some problems are long: of a lognormal distribution the mean is 57, and of 8
  # problems the longest takes about twice as long. No token ends an answer, its
  # limit does, so that both ways have the same lengths.
  lengths = np.exp(rng.normal(np.log(48), 0.6, prompts))
  requests = [
    decode.Request(
      rng.integers(1, 64, rng.integers(16, 33), dtype=np.int32),
      prompt,
      range(samples),
      max_new_tokens=int(np.clip(lengths[prompt], 1, 256)),
    )
    for prompt in range(prompts)
  ]
  # A static batch has all samples of some prompts, and ends with its longest.
  static = {"rows_per_prompt": samples, "refill": 1.0, "most_steps": 256}

  def answering(**options):
    def answer():
      usage = decode.Usage()
      tokens = {
        (each.request, each.sample): each.tokens.tolist()
        for each in decode.answer_requests(
          policy,
          requests,
          jax.random.key(1),
          config,
          eos_ids=(),
          slots=slots,
          usage=usage,
          **options,
        )
      }
      return tokens, usage.share

    return answer

  ways = {"refilled": answering(), "static": answering(**static)}
  seconds, results = take_turns("collection", ways, repeats)
  tokens = samples * sum(request.max_new_tokens for request in requests)
  ways = {
    name: {
      "seconds": [round(s, 3) for s in seconds[name]],
      "tokens_per_s": tokens / statistics.median(seconds[name]),
      "useful_slot_steps": results[name][1],
    }
    for name in ways
  }
  same = [
    results["static"][0][place] == tokens
    for place, tokens in results["refilled"][0].items()
  ]
  return {
    "weights": models.count_params(policy),
    "prompts": prompts,
    "samples": samples,
    "slots": slots,
    "tokens": tokens,
    **ways,
    "speed_ratio": ways["refilled"]["tokens_per_s"]
    / ways["static"]["tokens_per_s"],
    "same_answers": sum(same) / len(same),
  }


def say(text: str) -> None:
  """Tells whoever waits how far it is."""
  print(text, file=sys.stderr, flush=True)


def main() -> None:
  """Reads the arguments, measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument(
    "--part", choices=("greedy", "collection", "all"), default="all"
  )
  parser.add_argument("--size", choices=("smollm2", "tiny"), default="smollm2")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.serve:
    side, folder, threads = arguments.serve
    serve(side, folder, int(threads))
    return
  report = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
  if arguments.part != "collection":
    report["greedy"] = measure_greedy(
      arguments.size, arguments.repeats, arguments.threads
    )
  if arguments.part != "greedy":
    report["collection"] = {
      name: measure_collection(
        arguments.size == "tiny", shape, arguments.repeats
      )
      for name, shape in collection_shapes(arguments.size).items()
    }
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
