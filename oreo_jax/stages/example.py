"""One answer, step by step: what the value says of it (paper, section 5.3)."""

from typing import Any

import numpy as np

from oreo_jax import data, models
from oreo_jax.data.steps import step_starts
from oreo_jax.losses import token_logprobs
from oreo_jax.models import Params
from oreo_jax.stages.pipeline import make_trajectory
from oreo_jax.stages.workspace import Workspace
from oreo_jax.tasks.task import Problem


def value_example(
  workspace: Workspace,
  policy: Params,
  problem: Problem,
  text: str,
  tokens: np.ndarray,
  along: np.ndarray,
  reward: float,
) -> dict[str, Any]:
  """Returns an answer with its value after every step (paper 5.3)."""
  trajectory = make_trajectory(workspace, problem, text, reward)
  sequence = data.tokenize_trajectory(
    trajectory,
    workspace.tokenizer,
    granularity="step",
    delimiters=workspace.config.data.delimiters,
  )
  ratios = _log_ratios(workspace, policy, sequence.tokens)
  prompt = int(np.argmax(sequence.action_mask))
  starts = np.flatnonzero(sequence.decision_mask[: prompt + len(tokens)])
  ends = [*starts[1:], prompt + len(tokens)]
  cuts = step_starts(text, workspace.config.data.delimiters)
  parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
  beta = workspace.config.train.beta
  before = start_value = float(along[0])
  steps = []
  for part, start, end in zip(parts, starts, ends, strict=False):
    value = float(along[end - prompt])
    steps.append(
      {
        "text": part,
        "value": value,
        "explicit_advantage": value - before,
        "implicit_advantage": float(beta * ratios[start:end].sum()),
      }
    )
    before = value
  return {
    "prompt": problem.prompt,
    "start_value": start_value,
    "steps": steps,
    "reward": reward,
  }


def _log_ratios(
  workspace: Workspace, policy: Params, tokens: np.ndarray
) -> np.ndarray:
  """Returns f64[L]: log pi - log ref of each token, 0 for the first."""
  config = workspace.config.model
  inputs, targets = tokens[None, :-1], tokens[None, 1:]

  def logps(params):
    hidden = models.apply(params, inputs, config).hidden
    head = models.head_matrix(params, config)
    found = token_logprobs(
      hidden, head, targets, logit_scale=config.logit_scale
    )
    return np.asarray(found.logps[0], np.float64)

  ratios = logps(policy) - logps(workspace.start_policy())
  return np.concatenate([[0.0], ratios])
