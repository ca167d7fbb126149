"""Rows of data files as they are written: this project's and TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from oreo_jax.data.sampled import BEHAVIOUR_LOGPS
from oreo_jax.data.schema import TOOLS, Pair, Trajectory, Turn


def trajectory_row(trajectory: Trajectory) -> dict[str, Any]:
  """Returns the row this project writes for a trajectory."""
  row: dict[str, Any] = {"id": trajectory.id}
  if trajectory.problem != trajectory.prompt:
    row["problem"] = trajectory.problem
  if trajectory.is_chat:
    row["conversations"] = _dicts(trajectory.turns)
    if trajectory.given:
      row["given"] = trajectory.given
    row |= _template_keys(trajectory)
  else:
    row["prompt"] = trajectory.prompt
    row["response"] = trajectory.response
  row["reward"] = trajectory.reward
  if trajectory.turn_rewards is not None:
    row["turn_rewards"] = list(trajectory.turn_rewards)
  row["truncated"] = trajectory.truncated
  if trajectory.pair:
    row["pair"] = trajectory.pair
  if trajectory.sampled is not None:
    row["tokens"] = [turn.tokens.tolist() for turn in trajectory.sampled]
    names = trajectory.sampled[0].arrays()
    arrays = {
      name: [_floats(turn.arrays()[name]) for turn in trajectory.sampled]
      for name in names
    }
    if BEHAVIOUR_LOGPS in arrays:
      row["logps"] = arrays.pop(BEHAVIOUR_LOGPS)
    if arrays:
      row["token_extras"] = arrays
  return row


def prompt_completion_row(trajectory: Trajectory) -> dict[str, Any]:
  """Returns the row of TRL's prompt-completion type."""
  if not trajectory.is_chat:
    return {"prompt": trajectory.prompt, "completion": trajectory.response}
  first = trajectory.actions[0]
  return {
    "prompt": _dicts(trajectory.turns[:first]),
    "completion": _dicts(trajectory.turns[first:]),
    **_template_keys(trajectory),
  }


def unpaired_row(
  trajectory: Trajectory, *, threshold: float = 0.5
) -> dict[str, Any]:
  """Returns the row of TRL's unpaired-preference type."""
  row = prompt_completion_row(trajectory)
  return row | {"label": trajectory.reward > threshold}


def preference_row(pair: Pair) -> dict[str, Any]:
  """Returns the row of TRL's preference type, with its prompt."""
  chosen, rejected = map(prompt_completion_row, pair)
  if chosen["prompt"] != rejected["prompt"]:
    raise ValueError(
      f"the pair {pair.chosen.place} and {pair.rejected.place} has two"
      " prompts; a preference is between answers to one prompt"
    )
  answers = {
    "chosen": chosen.pop("completion"),
    "rejected": rejected["completion"],
  }
  return chosen | answers


def _floats(numbers: np.ndarray) -> list[float]:
  """Returns f32[L] as numbers that JSON writes in as few digits as it takes."""
  return [float(str(number)) for number in numbers.astype(np.float32)]


def _template_keys(trajectory: Trajectory) -> dict[str, Any]:
  """Returns the keys of a row that are for its chat template."""
  options = dict(trajectory.template_args or {})
  keys = {TOOLS: options.pop(TOOLS, None), "chat_template_kwargs": options}
  return {key: value for key, value in keys.items() if value}


def _dicts(turns: Sequence[Turn]) -> list[dict[str, Any]]:
  return [
    turn.message() | ({} if turn.is_learned else {"weight": 0})
    for turn in turns
  ]
