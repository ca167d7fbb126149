"""One answer, step by step: what the value says of it (paper, section 5.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from oreo_jax import data, scoring
from oreo_jax.config import ModelConfig
from oreo_jax.models import Params
from oreo_jax.rollout.codec import Codec
from oreo_jax.tasks import Problem


def worked_example(
  policy: Params,
  base: Params,
  problem: Problem,
  tokens: np.ndarray,
  along: np.ndarray,
  reward: float,
  codec: Codec,
  config: ModelConfig,
  mesh: Mesh,
  *,
  beta: float,
) -> dict[str, Any]:
  """Returns an answer with its value after every step (paper 5.3).

  The steps are cut where training and search cut them: on the sampled tokens
  themselves, which are never encoded again from their text.

  Args:
    policy: the trained policy.
    base: its reference.
    problem: what was asked.
    tokens: i32[n], the sampled answer without its end; may be empty.
    along: f32[n + 1], V after 0, 1, ... n of the tokens.
    reward: what the answer earned.
    codec: cuts steps and makes text of them.
    config: the architecture of both policies.
    mesh: the device mesh.
    beta: of the soft Bellman equation.
  """
  steps: list[dict[str, Any]] = []
  if len(tokens):
    ratios = _log_ratios(policy, base, problem, tokens, codec, config, mesh)
    starts = codec.step_starts(tokens)
    before = float(along[0])
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
      value = float(along[end])
      steps.append(
        {
          "text": codec.text(tokens[start:end]),
          "value": value,
          "explicit_advantage": value - before,
          "implicit_advantage": float(beta * ratios[start:end].sum()),
        }
      )
      before = value
  return {
    "prompt": problem.prompt,
    "start_value": float(along[0]),
    "steps": steps,
    "reward": reward,
  }


def _log_ratios(
  policy: Params,
  base: Params,
  problem: Problem,
  tokens: np.ndarray,
  codec: Codec,
  config: ModelConfig,
  mesh: Mesh,
) -> np.ndarray:
  """Returns f64[n]: log pi - log ref of each token of the answer."""
  (prompt,) = codec.prompts([problem])
  ids = np.concatenate([prompt, tokens]).astype(np.int32)
  action = np.arange(len(ids)) >= len(prompt)
  sequence = data.Tokenized(
    tokens=ids,
    action_mask=action,
    decision_mask=action,
    rewards=np.zeros(len(ids), np.float32),
  )
  scorer = scoring.Scorer(
    [sequence],
    scoring.policy_logps(config, chunk_size=512, vocab_chunk=8192),
    mesh,
    row_length=len(ids) - 1,
    batch_size=1,
  )
  logps, ref_logps = (scorer(p)[0]["logps"] for p in (policy, base))
  return logps.astype(np.float64) - ref_logps
