"""The stages: supervised fine-tuning, collection, training.

Each reads what it needs from the work directory and leaves its outcome there,
so that it can be run alone, again, or on another machine. A stage that is done
is not done again; one that was cut off goes on from its last checkpoint.
"""

import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from oreo_jax import data, decode, models, train
from oreo_jax.analysis.values import held_out_values
from oreo_jax.config import ConfigError
from oreo_jax.data import construct
from oreo_jax.data.encoding import tokenize_prompt
from oreo_jax.metrics import FILE_NAME, read_metrics
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.stages.workspace import Workspace
from oreo_jax.tasks.task import Problem
from oreo_jax.train.objectives import OBJECTIVES

# What a role is called in an export.
_EXPORTED = {"policy": "policy", "critic": "value"}


def sft(workspace: Workspace) -> None:
  """Fine-tunes the starting policy on the task's demonstrations."""
  if workspace.is_done("sft"):
    return logging.info("sft is done: %s", workspace.path("sft"))
  if workspace.task is None:
    raise ConfigError(
      "the sft stage needs demonstrations: set --config.task.name, or start "
      "from a checkpoint with --config.init=DIR"
    )
  run = workspace.begin("sft")
  config = workspace.config
  shown = [
    make_trajectory(workspace, problem, answer, 1.0, id=problem.id)
    for problem, answer in workspace.task.demonstrations(
      config.sft.examples or None
    )
  ]
  sequences = _tokenize(workspace, shown, "token")
  steps = _train(workspace, "sft", sequences, workspace.initial_policy())
  run.done(steps=steps, demonstrations=len(sequences))


def collect(workspace: Workspace) -> None:
  """Samples trajectories from the policy and has the task grade them."""
  if workspace.is_done("collect"):
    return logging.info("collect is done: %s", workspace.path("collect"))
  if workspace.task is None:
    raise ConfigError(
      "the collect stage needs problems: set --config.task.name, or bring "
      "trajectories with --config.data.path=FILE"
    )
  run = workspace.begin("collect")
  settings = workspace.config.collect
  skip = settings.skip
  count = skip + settings.problems if settings.problems else None
  problems = workspace.task.problems("train", count)[skip:]
  policy = workspace.start_policy()
  start = time.monotonic()
  responses, answers = sample_responses(
    workspace,
    policy,
    problems,
    description="collect",
    seed=settings.seed,
    num_samples=settings.samples,
    max_new_tokens=settings.max_new_tokens,
    batch_size=settings.batch_size,
    sampler=decode.Sampler(
      settings.temperature, settings.top_k, settings.top_p
    ),
  )
  seconds = time.monotonic() - start
  rewards = grade(workspace, problems, responses, answers.finished)
  found = make_trajectories(
    workspace, problems, responses, rewards, answers.finished
  )
  kept = (
    construct.select_balanced(found, seed=settings.seed)
    if settings.select == "balanced"
    else found
  )
  if workspace.is_chief:
    data.save_trajectories(
      workspace.path("collect") / "trajectories.jsonl", kept
    )
  run.done(
    problems=len(problems),
    sampled=len(found),
    kept=len(kept),
    success=float(np.mean([t.reward for t in found])),
    truncated=float(1.0 - answers.finished.mean()),
    tokens_per_second=float(answers.lengths.sum() / seconds),
  )


def train_objective(workspace: Workspace, objective: str) -> None:
  """Trains a policy (and a value network) on the trajectories.

  Args:
    workspace: the stage's folder is named after the objective.
    objective: a key of `train.objectives.OBJECTIVES`.
  """
  if objective not in OBJECTIVES:
    raise ConfigError(
      f"config.train.objective={objective!r} is unknown: set it to one of "
      + ", ".join(sorted(set(OBJECTIVES) - {"sft"}))
    )
  if workspace.is_done(objective):
    return logging.info("%s is done: %s", objective, workspace.path(objective))
  run = workspace.begin(objective)
  settings = workspace.config.data
  trajectories = workspace.trajectories()
  used, held = data.split_by_problem(
    trajectories, fraction=settings.held_out, seed=settings.seed
  )
  granularity = workspace.config.train.granularity
  held_out = _tokenize(workspace, held, granularity)
  sequences = OBJECTIVES[objective].sequences(
    used,
    lambda chosen: _tokenize(workspace, chosen, granularity),
    workspace.config.train,
  )
  if used and not sequences:
    right = sum(t.reward > 0.5 for t in used)
    raise ConfigError(
      f"config.train.objective={objective!r} finds nothing to learn from in "
      f"{len(used)} trajectories, {right} of them right: rejection sampling "
      "needs right answers, DPO right and wrong ones to the same problem; "
      "collect more with --config.collect.samples, or start from a better "
      "policy"
    )
  base = workspace.start_policy()
  figures: dict[str, Any] = {}
  steps = _train(workspace, objective, sequences, base, held_out, figures)
  run.done(
    steps=steps,
    trajectories=len(used),
    held_out=len(held),
    sequences=len(sequences),
    **figures,
  )


def _train(
  workspace: Workspace,
  objective: str,
  sequences: Sequence[Any],
  base: Params,
  held_out: Sequence[data.Tokenized] = (),
  figures: dict[str, Any] | None = None,
) -> int:
  """Fits and saves; returns the number of steps."""
  config = workspace.config
  stage = config.sft if objective == "sft" else config.train
  loader = data.make_loader(
    sequences,
    batch_size=stage.batch_size,
    row_length=config.data.row_length,
    seed=stage.seed,
    epochs=stage.epochs,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    on_long=config.data.on_long,
  )
  steps = min(loader.num_steps, stage.max_steps or loader.num_steps)
  setup = train.make_setup(
    config, OBJECTIVES[objective], steps, loader.max_segments
  )
  logging.info(
    "%s: %d sequences, %d steps of %d rows, rows %.0f%% full",
    objective,
    loader.num_sequences,
    steps,
    stage.batch_size,
    100 * loader.fill(),
  )
  measure = None
  if held_out and setup.objective.needs_critic:
    measure = held_out_values(held_out, setup, workspace.config, workspace.mesh)
  state = train.fit(
    base,
    loader,
    setup,
    mesh=workspace.mesh,
    directory=workspace.path(objective),
    seed=config.seed,
    description=objective,
    measure=measure,
  )
  full = train.full_params(state.params, base, setup)
  if measure is not None and figures is not None and workspace.is_chief:
    # As after the last step: to look again would cost as much as it did.
    last = read_metrics(workspace.path(objective) / FILE_NAME)[-1]
    figures["held_out_values"] = {
      name: figure for name, figure in last.items() if "heldout/" in name
    }
  workspace.save_model(objective, steps, *train.plain_models(full, setup))
  after_sft = objective != "sft" and workspace.path("sft").exists()
  for role, architecture in train.full_configs(setup).items():
    if role in full and architecture.lora_rank:
      models.save_adapter(
        workspace.path(objective) / "adapters" / _EXPORTED[role],
        full[role],
        architecture,
        base="" if after_sft else config.init,
        overwrite=True,
      )
  return steps


def export(workspace: Workspace) -> None:
  """Writes what training made as Hugging Face directories.

  `export/policy` opens as a causal language model, `export/value` as a
  classifier with one label; both with tokenizer and chat template, and with
  adapters merged. The adapters alone, where there are any, are PEFT
  directories: `export/policy_adapter`, `export/value_adapter`.
  """
  objective = workspace.config.train.objective
  workspace.record(objective)
  folder = workspace.path("export")
  roles, config = workspace.load_model(objective)
  for role in roles:
    if (folder / _EXPORTED[role]).exists():
      raise ConfigError(
        f"{folder / _EXPORTED[role]} is there already: remove it, or write it "
        "again with --overwrite"
      )
  run = workspace.begin("export")
  for role, params in roles.items():
    models.save_hf(
      folder / _EXPORTED[role],
      params,
      config,
      tokenizer=workspace.tokenizer,
      eos_ids=workspace.eos_ids,
    )
    adapter = workspace.path(objective) / "adapters" / _EXPORTED[role]
    if adapter.exists() and workspace.is_chief:
      shutil.copytree(adapter, folder / f"{_EXPORTED[role]}_adapter")
  run.done(**{_EXPORTED[role]: str(folder / _EXPORTED[role]) for role in roles})


def sample_responses(
  workspace: Workspace,
  policy: Params,
  problems: Sequence[Problem],
  *,
  description: str,
  seed: int,
  num_samples: int = 1,
  **options: Any,
) -> tuple[list[str], decode.Generation]:
  """Samples answers to problems, with a progress bar.

  Args:
    workspace: tokenizer and model settings.
    policy: what is sampled from.
    problems: n of them.
    description: shown beside the progress bar.
    seed: of the draws.
    num_samples: answers a problem.
    **options: of `decode.generate_all`.

  Returns:
    The n * num_samples responses as text, problem-major, and their tokens.
  """
  prompts = tokenize_problems(workspace, problems)
  with Progress(
    len(prompts), description, unit="problem", enabled=workspace.is_chief
  ) as progress:
    answers = decode.generate_all(
      policy,
      prompts,
      jax.random.key(seed),
      workspace.config.model,
      eos_ids=workspace.eos_ids,
      num_samples=num_samples,
      on_progress=progress.update,
      **options,
    )
  return decode_text(workspace, answers), answers


def tokenize_problems(
  workspace: Workspace, problems: Sequence[Problem]
) -> list[np.ndarray]:
  """Returns the prompts' tokens, as in the trajectories trained on."""
  chat = workspace.config.data.chat
  return [
    tokenize_prompt(
      [data.Turn("user", p.prompt)] if chat else p.prompt, workspace.tokenizer
    )
    for p in problems
  ]


def make_trajectory(
  workspace: Workspace,
  problem: Problem,
  response: str,
  reward: float,
  **fields: Any,
) -> data.Trajectory:
  """Returns an answer to a task's problem, a chat if `data.chat` says so."""
  return data.Trajectory.from_text(
    problem.prompt,
    response,
    reward,
    problem=problem.id,
    is_chat=workspace.config.data.chat,
    **fields,
  )


def decode_text(workspace: Workspace, answers: decode.Generation) -> list[str]:
  """Returns the answers' text, without special tokens."""
  return workspace.tokenizer.batch_decode(
    answers.answers(), skip_special_tokens=True
  )


def grade(
  workspace: Workspace,
  problems: Sequence[Problem],
  responses: Sequence[str],
  finished: np.ndarray,
) -> np.ndarray:
  """Returns f32[n], a reward a response, problem-major; 0 if truncated."""
  samples = len(responses) // len(problems)
  repeated = [problem for problem in problems for _ in range(samples)]
  return workspace.task.grade(repeated, responses) * finished


def make_trajectories(
  workspace: Workspace,
  problems: Sequence[Problem],
  responses: Sequence[str],
  rewards: np.ndarray,
  finished: np.ndarray,
) -> list[data.Trajectory]:
  """Returns the sampled responses, problem-major, as trajectories."""
  samples = len(responses) // len(problems)
  return [
    make_trajectory(
      workspace,
      problems[index // samples],
      response,
      float(reward),
      id=f"{problems[index // samples].id}/{index % samples}",
      truncated=not ended,
    )
    for index, (response, reward, ended) in enumerate(
      zip(responses, rewards, finished, strict=True)
    )
    # A blank answer has no action to learn from; the reader refuses it.
    if response.strip()
  ]


def _tokenize(
  workspace: Workspace,
  trajectories: Sequence[data.Trajectory],
  granularity: str,
) -> list[data.Tokenized]:
  settings = workspace.config.data
  return data.tokenize_trajectories(
    trajectories,
    workspace.tokenizer,
    granularity=granularity,
    delimiters=settings.delimiters,
    max_length=settings.max_length or settings.row_length + 1,
    on_error=settings.on_error,
    on_long=settings.on_long,
  )
