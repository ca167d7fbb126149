"""Search: longer answers, texts read once or anew, slots refilled or not.

    python benchmarks/search.py > search.json

All of it is the value-guided step beam with B = 4, each beam proposing 4 steps
of 8 tokens, with random weights of the demo's shape. No token ends a step.

`steps` searches answers of 8, 16 and 32 steps, and says how the cost of a token
grows with the length of the answer.

`encoding` searches answers of 32 steps behind prompts of 64 tokens, by
oreo_jax, and as scripts around a sampler do: after every step the critic reads
the whole text of every candidate; and once more with the policy reading the
whole text of every beam as well. What is drawn and chosen is the same. The
policy alone, without any critic, tells the critic's share from the rest.

`slots` searches questions whose numbers of steps have a long tail, with slots
that are refilled and with static batches: the same slots, refilled when all of
them are free. Both give the same answers.

The result is JSON on standard output. Run it on an idle machine; see
docs/performance.md.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from unittest import mock

import jax
import numpy as np
from search_reread import search_anew
from ways import take_turns

from oreo_jax import decode, models
from oreo_jax.config import Config

BEAMS, STEP = 4, 8
VOCAB, EOS = 64, 0


@dataclasses.dataclass(frozen=True)
class Case:
  """How much is searched."""

  questions: int
  prompt: int  # tokens
  steps: tuple[int, ...]  # of the answers; the last is that of `encoding`
  queue: int  # questions of `slots`
  slots: int
  most_steps: int  # of a question of `slots`


CASES = {
  "demo": Case(16, 64, (8, 16, 32), queue=64, slots=8, most_steps=32),
  "tiny": Case(2, 5, (1, 3), queue=9, slots=3, most_steps=24),
}


class Models:
  """Policy and critic, random; what is drawn is the same in every run."""

  def __init__(self):
    """Draws the weights."""
    config = dataclasses.replace(Config().model, vocab_size=VOCAB)
    keys = jax.random.split(jax.random.key(0), 3)
    critic = models.init(keys[1], config, head="value")
    # A head of zeros would rank nothing.
    critic["value_head"] = jax.random.normal(
      keys[2], critic["value_head"].shape
    )
    # As the stages hold them on a lone CPU.
    policy = models.init(keys[0], config)
    self.policy, self.config = models.unstack_layers(policy, config)
    self.critic, _ = models.unstack_layers(critic, config)

  def plan(self, steps: int, *, critic=True, score=decode.by_value, eos=()):
    """Returns the plan of a search of at most so many steps.

    Args:
      steps: most steps of an answer.
      critic: whether there is one.
      score: what candidates are ranked by.
      eos: tokens that end an answer.
    """
    return decode.make_plan(
      self.policy,
      self.critic if critic else None,
      jax.random.key(1),
      self.config,
      strategy=decode.Strategy(
        beams=BEAMS, max_steps=steps, max_step_tokens=STEP, score=score
      ),
      stops=decode.no_stops(VOCAB),
      eos_ids=eos,
      max_new_tokens=steps * STEP,
    )


def prompts_of(count: int, length: int) -> np.ndarray:
  """Returns i32[count, length]."""
  rng = np.random.default_rng(0)
  return rng.integers(1, VOCAB, (count, length), dtype=np.int32)


def rounded(seconds: list[float]) -> list[float]:
  """Returns seconds as they are printed."""
  return [round(s, 4) for s in seconds]


def found(search: decode.Search) -> tuple[list[list[int]], np.ndarray]:
  """Returns (answers, values) of a search."""
  answers = search.answers
  rows = zip(answers.tokens, answers.lengths, strict=True)
  return [row[:length].tolist() for row, length in rows], search.values


def agreement(ours: tuple, theirs: tuple) -> dict:
  """Says how far the results of two ways are the same."""
  same = [a == b for a, b in zip(ours[0], theirs[0], strict=True)]
  return {
    "same_answers": sum(same) / len(same),
    "largest_difference_of_values": float(np.abs(ours[1] - theirs[1]).max()),
  }


def measure_steps(networks: Models, case: Case, repeats: int) -> dict:
  """Measures answers of several lengths."""
  prompts = prompts_of(case.questions, case.prompt)

  def searching(steps: int):
    plan = networks.plan(steps)
    return lambda: decode.search(plan, prompts, slots=len(prompts))

  seconds, results = take_turns(
    "steps", {steps: searching(steps) for steps in case.steps}, repeats
  )
  lengths = []
  for steps in case.steps:
    median = statistics.median(seconds[steps])
    proposed = int(results[steps].proposed.sum())
    answered = int(results[steps].answers.lengths.sum())
    lengths.append(
      {
        "steps": steps,
        "seconds": rounded(seconds[steps]),
        "proposed_tokens": proposed,
        "answer_tokens": answered,
        "us_per_proposed_token": median / proposed * 1e6,
        "us_per_answer_token": median / answered * 1e6,
      }
    )
  first, last = (lengths[i]["us_per_proposed_token"] for i in (0, -1))
  return {
    "questions": case.questions,
    "prompt": case.prompt,
    "lengths": lengths,
    "cost_ratio": last / first,
  }


def measure_encoding(networks: Models, case: Case, repeats: int) -> dict:
  """Measures caches against texts that are read anew after every step."""
  prompts = prompts_of(case.questions, case.prompt)
  steps = case.steps[-1]
  plan = networks.plan(steps)
  alone = networks.plan(steps, critic=False, score=decode.by_logp)
  ways = {
    "oreo_jax": lambda: found(decode.search(plan, prompts, slots=len(prompts))),
    "critic_anew": lambda: search_anew(plan, prompts),
    "both_anew": lambda: search_anew(plan, prompts, policy_too=True),
    "policy_alone": lambda: found(
      decode.search(alone, prompts, slots=len(prompts))
    ),
  }
  seconds, results = take_turns("encoding", ways, repeats)
  median = {name: statistics.median(s) for name, s in seconds.items()}
  ours = median["oreo_jax"]
  report = {
    "questions": case.questions,
    "prompt": case.prompt,
    "steps": steps,
    **{name: {"seconds": rounded(seconds[name])} for name in ways},
    "critic_ratio": (median["critic_anew"] - median["policy_alone"])
    / (ours - median["policy_alone"]),
  }
  for name in ("critic_anew", "both_anew"):
    report[name] |= {
      "speed_ratio": median[name] / ours,
      **agreement(results["oreo_jax"], results[name]),
    }
  return report


def finished_first(candidates: decode.Candidates) -> jax.Array:
  """Ranks by value, answers that ended before all others."""
  return candidates.values + 1e3 * candidates.finished.astype("float32")


def measure_slots(networks: Models, case: Case, repeats: int) -> dict:
  """Measures slots that are refilled against static batches."""
  prompts = prompts_of(case.queue, case.prompt)
  # A token in 64 ends an answer, and a question ends with its fourth answer:
  # after some steps or after many, as chance has it.
  plan = networks.plan(case.most_steps, score=finished_first, eos=(EOS,))

  def refilled():
    return found(
      decode.search(plan, prompts, slots=case.slots, prompt_length=case.prompt)
    )

  def static():
    batches = [
      np.arange(first, min(first + case.slots, case.queue))
      for first in range(0, case.queue, case.slots)
    ]
    parts = [
      found(
        decode.search(
          plan,
          prompts[batch],
          slots=case.slots,
          prompt_length=case.prompt,
          problems=batch,
        )
      )
      for batch in batches
    ]
    answers = [answer for part in parts for answer in part[0]]
    return answers, np.concatenate([part[1] for part in parts])

  ways = {"refilled": refilled, "static": static}
  used = {name: slot_steps(call) for name, call in ways.items()}
  seconds, results = take_turns("slots", ways, repeats)
  median = {name: statistics.median(s) for name, s in seconds.items()}
  return {
    "questions": case.queue,
    "slots": case.slots,
    **{
      name: {"seconds": rounded(seconds[name]), **used[name]} for name in ways
    },
    "speed_ratio": median["static"] / median["refilled"],
    **agreement(results["refilled"], results["static"]),
  }


def slot_steps(call) -> dict:
  """Returns how many steps the slots took in a call, and the useful share."""
  # The name of the module is also that of its function.
  module = sys.modules["oreo_jax.decode.search"]
  take_round = module.search_round
  useful = taken = 0

  def counted(plan, state, refill_at):
    nonlocal useful, taken
    before = np.array(state.steps)
    state, report = take_round(plan, state, refill_at)
    steps = np.asarray(state.steps) - before
    useful += int(steps.sum())
    # Who is searched at the end of a round was so from its beginning.
    taken += int(steps.max()) * steps.size
    return state, report

  with mock.patch.object(module, "search_round", counted):
    call()
  return {"slot_steps": taken, "useful_slot_steps": useful / taken}


PARTS = {
  "steps": measure_steps,
  "encoding": measure_encoding,
  "slots": measure_slots,
}


def main() -> None:
  """Reads the arguments, measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
  parser.add_argument("--size", choices=tuple(CASES), default="demo")
  parser.add_argument("--repeats", type=int, default=5)
  arguments = parser.parse_args()
  networks = Models()
  report = {
    "cores": os.cpu_count(),
    "load": os.getloadavg()[0],
    "size": arguments.size,
    "parameters": models.count_params(networks.policy),
    "beams": BEAMS,
    "step_tokens": STEP,
  }
  for name, measure in PARTS.items():
    if arguments.part in (name, "all"):
      report[name] = measure(networks, CASES[arguments.size], arguments.repeats)
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
