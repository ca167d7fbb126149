"""The evaluation: every method on the same held-out problems.

Leaves `results.json` in the work directory: accuracy with 95% intervals, what
each method cost, how good the values are, and one worked example.
"""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from oreo_jax import decode
from oreo_jax.analysis import values
from oreo_jax.analysis.statistics import wilson_interval
from oreo_jax.config import ConfigError
from oreo_jax.files import write_json
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.stages.bench import Bench
from oreo_jax.stages.example import value_example
from oreo_jax.stages.heldout import evaluate_trajectories
from oreo_jax.stages.pipeline import decode_text, grade, tokenize_problems
from oreo_jax.stages.workspace import Workspace

NAMES = {
  "sft": "SFT",
  "rejection": "rejection sampling",
  "oreo": "OREO",
  "value": "value of the base policy",
  "dpo": "DPO",
  "kto": "KTO",
  "dqo": "DQO",
}


class Outcome(NamedTuple):
  """What a method answered."""

  rewards: np.ndarray  # f32[problems]
  tokens: float  # generated for a problem, all samples or proposals
  seconds: float


def evaluate(
  workspace: Workspace, *, install_s: float | None = None
) -> dict[str, Any]:
  """Runs the evaluation; returns what it wrote to `results.json`.

  Args:
    workspace: holds the trained models.
    install_s: seconds the installation took, to stand among the timings.
  """
  path = workspace.directory / "results.json"
  if path.exists() and workspace.is_done("evaluate"):
    return json.loads(path.read_text(encoding="utf-8"))
  if workspace.task is None:
    return evaluate_trajectories(workspace)
  run = workspace.begin("evaluate")
  config = workspace.config
  settings = config.evaluate
  bench = Bench(
    workspace,
    workspace.task.problems(settings.split, settings.problems or None),
  )
  stages = [
    stage
    for stage in ("sft", *config.baselines, config.train.objective)
    if (workspace.path(stage) / "record.json").exists()
  ]
  if not stages:
    raise ConfigError(f"no trained model in {workspace.directory}: train first")
  methods = []
  found: dict[str, Any] = {}
  for stage in dict.fromkeys(stages):
    roles, _ = workspace.load_model(stage)
    if "policy" not in roles:  # the objective `value` leaves it as it was
      roles["policy"] = workspace.start_policy()
    name = NAMES[stage]
    methods += _plain_methods(bench, stage, name, roles["policy"])
    if "critic" in roles:
      methods += _ranked_methods(bench, stage, name, roles)
      methods += _search_methods(bench, stage, name, roles)
      found["values"], found["example"] = _judge_values(bench, roles)
  results = {
    "task": workspace.task.name,
    "seed": config.seed,
    "problems": len(bench.problems),
    "methods": methods,
    **found,
  }
  run.done(methods=len(methods))
  timings = {} if install_s is None else {"install": install_s}
  results["timings"] = timings | {
    stage: workspace.record(stage)["seconds"]
    for stage in dict.fromkeys(("sft", "collect", *stages, "evaluate"))
    if (workspace.path(stage) / "record.json").exists()
  }
  if workspace.is_chief:
    write_json(path, results)
  return results


def _method(
  name: str, policy: str, search: str, budget: int, outcome: Outcome
) -> dict[str, Any]:
  correct, total = int(outcome.rewards.sum()), len(outcome.rewards)
  return {
    "name": name,
    "policy": policy,
    "search": search,
    "budget": budget,
    "accuracy": correct / total,
    "interval": list(wilson_interval(correct, total)),
    "correct": correct,
    "total": total,
    "tokens_per_problem": outcome.tokens,
    "seconds": outcome.seconds,
    "rewards": outcome.rewards.astype(int).tolist(),
  }


def _plain_methods(
  bench: Bench, stage: str, name: str, policy: Params
) -> list[dict[str, Any]]:
  """Greedy decoding and one sample."""
  samplers = {
    "greedy": decode.GREEDY,
    "sample": bench.sampler(),
  }
  methods = []
  for search, sampler in samplers.items():
    rewards, _, answers, seconds = bench.sample(
      policy, description=f"{name}, {search}", sampler=sampler
    )
    outcome = Outcome(rewards, float(answers.lengths.mean()), seconds)
    label = f"{name}, greedy" if search == "greedy" else f"{name}, one sample"
    methods.append(_method(label, stage, search, 1, outcome))
  return methods


def _ranked_methods(
  bench: Bench, stage: str, name: str, roles: dict[str, Params]
) -> list[dict[str, Any]]:
  """Votes and best-of-N: the budgets share one set of samples."""
  workspace = bench.workspace
  settings = workspace.config.evaluate
  most = max(settings.budgets)
  rewards, texts, answers, seconds = bench.sample(
    roles["policy"],
    description=f"{name}, {most} samples",
    num_samples=most,
    sampler=bench.sampler(),
  )
  start = time.monotonic()
  scores = decode.reduce_values(
    bench.values_along(roles["critic"], answers), answers
  )
  judging = time.monotonic() - start
  shape = (len(bench.problems), most)
  rewards, scores = rewards.reshape(shape), scores.reshape(shape)
  lengths = answers.lengths.reshape(shape)
  finals = [workspace.task.final_answer(text) for text in texts]

  def votes(question: int, count: int) -> list[str]:
    return finals[question * most :][:count]

  def chosen(count: int, choose: Callable[[int], int]) -> np.ndarray:
    return np.array([rewards[i, choose(i)] for i in range(len(rewards))])

  methods = []
  for count in (n for n in settings.budgets if n > 1):
    tokens = float(lengths[:, :count].sum(axis=1).mean())
    spent = seconds * count / most
    rules = {
      "vote": lambda i, n=count: decode.majority_vote(votes(i, n)),
      "weighted_vote": lambda i, n=count: decode.majority_vote(
        votes(i, n), scores[i, :n]
      ),
      "best_of_n": lambda i, n=count: int(np.argmax(scores[i, :n])),
    }
    labels = {
      "vote": f"{name} + majority of {count}",
      "weighted_vote": f"{name} + value-weighted vote of {count}",
      "best_of_n": f"{name} + best of {count} by value",
    }
    for search, choose in rules.items():
      cost = spent + (judging * count / most if search != "vote" else 0.0)
      outcome = Outcome(chosen(count, choose), tokens, cost)
      methods.append(_method(labels[search], stage, search, count, outcome))
  return methods


def _search_methods(
  bench: Bench, stage: str, name: str, roles: dict[str, Params]
) -> list[dict[str, Any]]:
  """Step beam search at every budget."""
  workspace = bench.workspace
  settings = workspace.config.evaluate
  prompts = tokenize_problems(workspace, bench.problems)
  stops = decode.make_stops(
    workspace.tokenizer,
    workspace.task.step_delimiters,
    workspace.config.model.vocab_size,
  )
  methods = []
  for beams in (n for n in settings.budgets if n > 1):
    start = time.monotonic()
    with Progress(
      len(prompts),
      f"{name}, beam {beams}",
      unit="problem",
      enabled=workspace.is_chief,
    ) as progress:
      found = decode.search_all(
        roles["policy"],
        roles["critic"],
        prompts,
        jax.random.key(settings.seed),
        workspace.config.model,
        beams=beams,
        stops=stops,
        eos_ids=workspace.eos_ids,
        max_new_tokens=settings.max_new_tokens,
        max_steps=settings.max_steps,
        max_step_tokens=settings.max_step_tokens,
        sampler=bench.sampler(),
        batch_size=settings.batch_size,
        on_progress=progress.update,
      )
    seconds = time.monotonic() - start
    texts = decode_text(workspace, found.answers)
    rewards = grade(workspace, bench.problems, texts, found.answers.finished)
    outcome = Outcome(rewards, float(found.proposed.mean()), seconds)
    label = f"{name} + beam search B={beams}"
    methods.append(_method(label, stage, "beam", beams, outcome))
  return methods


def _judge_values(
  bench: Bench, roles: dict[str, Params]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Values of right and wrong samples, and one sample step by step."""
  workspace = bench.workspace
  settings = workspace.config.evaluate
  few = Bench(workspace, bench.problems[: settings.value_problems or None])
  rewards, texts, answers, _ = few.sample(
    roles["policy"],
    description="values",
    num_samples=settings.value_samples,
    sampler=bench.sampler(),
  )
  along = few.values_along(roles["critic"], answers)
  states = answers.lengths - answers.finished
  names = [p.id for p in few.problems for _ in range(settings.value_samples)]
  train = workspace.config.train
  analysis = values.analyse(
    along,
    states,
    rewards,
    names,
    seed=settings.seed,
    reward_scale=train.reward_scale,
    reward_offset=train.reward_offset,
  )
  # The longest wrong answer to the first problem that was also solved: where
  # the value falls says where it went wrong.
  table = rewards.reshape(len(few.problems), -1)
  mixed = np.flatnonzero((table.max(axis=1) > 0) & (table.min(axis=1) == 0))
  if not len(mixed):
    return analysis, None
  first = int(mixed[0])
  wrong = np.flatnonzero(table[first] == 0) + first * settings.value_samples
  row = int(wrong[np.argmax(states[wrong])])
  example = value_example(
    workspace,
    roles["policy"],
    few.problems[first],
    texts[row],
    answers.tokens[row, : states[row]],
    along[row],
    float(rewards[row]),
  )
  return analysis, example
