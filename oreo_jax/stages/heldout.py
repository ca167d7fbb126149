"""What the value says of recorded trajectories of problems it never saw.

For runs without a task: nothing can be sampled and graded, but the held-out
trajectories have their labels. The value is compared with what costs nothing,
the length of the answer and its mean log-probability under the base policy.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from oreo_jax import data, models
from oreo_jax.analysis import values
from oreo_jax.analysis.auc import compare_scores
from oreo_jax.config import Config, ConfigError, ModelConfig
from oreo_jax.files import write_json
from oreo_jax.hosts import to_host
from oreo_jax.losses import token_logprobs
from oreo_jax.models import Params
from oreo_jax.progress import Progress
from oreo_jax.sharding import (
  batch_sharding,
  batch_shards,
  replicated,
  shard_whole_batch,
)
from oreo_jax.stages.workspace import Workspace

# Scores by name; the first is what the others are compared with.
VALUE, START = "value, last state", "value, before the answer"
LENGTH, LOGP = "length, shorter first", "mean log-probability, base policy"


class Answer(NamedTuple):
  """What the networks say of the tokens of one answer; f32[n]."""

  values: np.ndarray  # of the state before each token
  logps: np.ndarray  # of each token, under the base policy


def evaluate_trajectories(workspace: Workspace) -> dict[str, Any]:
  """Judges the value on held-out problems; returns and writes results.json."""
  config = workspace.config
  objective = config.train.objective
  path = workspace.directory / "results.json"
  if path.exists() and workspace.is_done("evaluate"):
    return json.loads(path.read_text(encoding="utf-8"))
  workspace.record(objective)
  run = workspace.begin("evaluate")
  roles, model = workspace.load_model(objective)
  if "critic" not in roles:
    raise ConfigError(
      f"config.train.objective={objective!r} trains no value, and without a "
      "task nothing else can be judged: set --config.train.objective=oreo or "
      "value, or --config.task.name"
    )
  _, held = data.split_by_problem(
    workspace.trajectories(),
    fraction=config.data.held_out,
    seed=config.data.seed,
  )
  sequences = data.tokenize_trajectories(
    held,
    workspace.tokenizer,
    delimiters=config.data.delimiters,
    on_error=config.data.on_error,
  )
  rewards = np.array([s.rewards.sum() for s in sequences])
  labels = rewards > 0.5
  if labels.all() or not labels.any():
    raise ConfigError(
      f"of {len(labels)} held-out trajectories {labels.sum()} are right, so "
      "that there is nothing to tell apart: raise --config.data.held_out"
    )
  answers = score_answers(
    workspace, sequences, roles["critic"], workspace.start_policy(), model
  )
  problems = [sequence.problem for sequence in sequences]
  seed = config.evaluate.seed
  results = {
    "task": "trajectories",
    "seed": config.seed,
    "problems": len(set(problems)),
    "methods": [],
    "values": _along(answers, rewards, problems, config),
    "value_scores": compare_scores(
      {
        VALUE: np.array([a.values[-1] for a in answers]),
        START: _of_problem([a.values[0] for a in answers], problems),
        LENGTH: np.array([-float(len(a.values)) for a in answers]),
        LOGP: np.array([a.logps.mean() for a in answers]),
      },
      labels,
      problems,
      seed=seed,
    ),
  }
  run.done(trajectories=len(labels), problems=results["problems"])
  results["timings"] = {
    stage: workspace.record(stage)["seconds"]
    for stage in (objective, "evaluate")
  }
  if workspace.is_chief:
    write_json(path, results)
  return results


def score_answers(
  workspace: Workspace,
  sequences: Sequence[data.Tokenized],
  critic: Params,
  base: Params,
  model: ModelConfig,
) -> list[Answer]:
  """Runs value network and base policy over packed trajectories.

  Args:
    workspace: mesh and sizes of a batch.
    sequences: the trajectories; those longer than a row get longer rows.
    critic: the value network.
    base: the policy whose log-probabilities are taken.
    model: the architecture of both.

  Returns:
    An Answer a sequence, in order.
  """
  settings, mesh = workspace.config, workspace.mesh
  shards = batch_shards(mesh)
  room = settings.data.row_length
  rows = settings.train.batch_size // settings.train.grad_accum

  def score(critic, base, batch):
    packed = {"positions": batch.positions, "segment_ids": batch.segment_ids}
    state = models.apply(critic, batch.tokens, model, **packed).hidden
    hidden = models.apply(base, batch.tokens, model, **packed).hidden
    logps = token_logprobs(
      hidden,
      models.head_matrix(base, model),
      batch.targets,
      chunk_size=settings.train.loss_chunk,
      logit_scale=model.logit_scale,
    ).logps
    return models.values(critic, state), logps

  score = jax.jit(
    score,
    in_shardings=(None, None, batch_sharding(mesh)),
    out_shardings=replicated(mesh),
  )
  fits = [len(sequence.tokens) - 1 <= room for sequence in sequences]
  found: dict[int, Answer] = {}
  with Progress(
    len(sequences), "values", unit="answer", enabled=workspace.is_chief
  ) as progress:
    for wanted in (True, False):
      chosen = [i for i, fit in enumerate(fits) if fit == wanted]
      if not chosen:
        continue
      part = [sequences[i] for i in chosen]
      longest = max(len(sequence.tokens) - 1 for sequence in part)
      length = room if wanted else -(-longest // 64) * 64
      size = -(-max(rows * room // length, 1) // shards) * shards
      loader = data.make_loader(
        part, batch_size=size, row_length=length, shuffle=False
      )
      for step in range(loader.num_steps):
        batch = loader.batch(step)
        scored = score(critic, base, shard_whole_batch(batch, mesh))
        arrays = [to_host(x) for x in scored]
        members = loader.sequence_indices(step)
        for member, *answer in values.answers_of(batch, members, *arrays):
          found[chosen[member]] = Answer(*answer)
          progress.update()
  return [found[i] for i in range(len(sequences))]


def _of_problem(scores: Sequence[float], problems: Sequence[str]) -> np.ndarray:
  """Returns each problem's mean: what differs within it is rounding."""
  _, group = np.unique(np.asarray(problems), return_inverse=True)
  means = np.bincount(group, scores) / np.bincount(group)
  return means[group]


def _along(
  answers: Sequence[Answer],
  rewards: np.ndarray,
  problems: Sequence[str],
  config: Config,
) -> dict[str, Any]:
  """Returns the values along the answers, at tenths of their length."""
  states = np.array([len(answer.values) - 1 for answer in answers])
  along = np.zeros((len(answers), int(states.max()) + 1), np.float32)
  for row, answer in zip(along, answers, strict=True):
    row[: len(answer.values)] = answer.values
  return values.analyse(
    along,
    states,
    rewards,
    problems,
    seed=config.evaluate.seed,
    reward_scale=config.train.reward_scale,
    reward_offset=config.train.reward_offset,
  )
