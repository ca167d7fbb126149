"""From trajectories to tokens with exact masks.

What a mask says is settled on text and carried over to tokens by offsets: a
token that straddles the boundary of two steps belongs to the step in which it
starts. Prompt and response meet at a token boundary.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from oreo_jax.data import errors
from oreo_jax.data.chat import CONTEXT, Piece
from oreo_jax.data.encoding import Encoded, encode_plans, make_plan
from oreo_jax.data.schema import Trajectory
from oreo_jax.data.steps import Delimiters, step_starts

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

GRANULARITIES = ("token", "step", "response")
# Trajectories tokenised at once.
CHUNK = 1024
# Stands for the end token when asking whether it begins a step.
_END_MARK = "\ue000"


class Tokenized(NamedTuple):
  """A trajectory in tokens; every array has shape [L], aligned on the token."""

  tokens: np.ndarray  # i32
  action_mask: np.ndarray  # bool: the policy produced this token
  decision_mask: np.ndarray  # bool: an action starts with this token
  rewards: np.ndarray  # f32: reward a token
  id: str = ""
  problem: str = ""


def tokenize_trajectory(
  trajectory: Trajectory,
  tokenizer: PreTrainedTokenizerBase,
  *,
  granularity: str = "token",
  delimiters: Delimiters = "lines",
  max_length: int | None = None,
) -> Tokenized:
  """Tokenises one trajectory; see `tokenize_trajectories`."""
  return tokenize_trajectories(
    [trajectory],
    tokenizer,
    granularity=granularity,
    delimiters=delimiters,
    max_length=max_length,
  )[0]


def tokenize_trajectories(
  trajectories: Sequence[Trajectory],
  tokenizer: PreTrainedTokenizerBase,
  *,
  granularity: str = "token",
  delimiters: Delimiters = "lines",
  max_length: int | None = None,
  on_error: str = "raise",
  on_long: str = "raise",
) -> list[Tokenized]:
  """Tokenises trajectories with their action and decision masks.

  Plain text is the beginning-of-sequence token if the tokenizer has one, the
  prompt, the response and, unless truncated, the end-of-sequence token as the
  last action. A chat is what the chat template makes of it.

  Args:
    trajectories: to tokenise.
    tokenizer: a fast tokenizer.
    granularity: what one action is: a "token", a "step", or the "response".
    delimiters: what ends a step; see `steps.step_starts`. The end token is a
      step of its own only right after a delimiter.
    max_length: most tokens a sequence may have.
    on_error: "raise", or "skip" to drop chats that the template cannot render
      and prompts that have no token or fill `max_length`, and log the counts.
    on_long: the same for a prompt that fits with a response that does not.

  Returns:
    The sequences, in order.

  Raises:
    TemplateError: the chat template refuses or rewrites the turns.
    PromptLengthError: the prompt has no token or leaves no room.
    SequenceLengthError: the sequence is longer than `max_length`.
    ValueError: an option is unknown, or the tokenizer lacks what it takes.
  """
  if granularity not in GRANULARITIES:
    raise ValueError(
      f"granularity is {granularity!r}, expected one of {GRANULARITIES}"
      " (--config.train.granularity)"
    )
  errors.check_choice(on_long, "on_long")
  plans = errors.keep_good(
    trajectories,
    lambda trajectory: [make_plan(trajectory, tokenizer)],
    on_error=on_error,
  )
  sequences: list[Tokenized] = []
  skipped: collections.Counter[str] = collections.Counter()
  for start in range(0, len(plans), CHUNK):
    chunk = plans[start : start + CHUNK]
    for trajectory, pieces, encoded in encode_plans(chunk, tokenizer):
      sequence = _assemble(trajectory, pieces, encoded, granularity, delimiters)
      error = _length_error(trajectory, sequence, max_length)
      if error is None:
        sequences.append(sequence)
        continue
      too_long = isinstance(error, errors.SequenceLengthError)
      if (on_long if too_long else on_error) == "raise":
        raise error
      skipped[error.kind] += 1
  errors.log_skipped(skipped, len(sequences))
  return sequences


def _length_error(
  trajectory: Trajectory, sequence: Tokenized, max_length: int | None
) -> errors.TrajectoryError | None:
  """Returns what is wrong with the length of a sequence, if anything."""
  length = len(sequence.tokens)
  prompt = int(sequence.action_mask.argmax())
  place = trajectory.place
  if not sequence.action_mask.any():
    return errors.EmptyResponseError(place, "no response token")
  if not prompt:
    return errors.PromptLengthError(
      place, "the prompt has no token and the tokenizer no BOS token"
    )
  if max_length is None or length <= max_length:
    return None
  if prompt >= max_length:
    return errors.PromptLengthError(
      place, f"the prompt has {prompt} tokens, max_length is {max_length}"
    )
  return errors.SequenceLengthError(
    place, f"the sequence has {length} tokens, max_length is {max_length}"
  )


def _assemble(
  trajectory: Trajectory,
  pieces: Sequence[Piece],
  encoded: Sequence[Encoded],
  granularity: str,
  delimiters: Delimiters,
) -> Tokenized:
  """Joins the tokens of the pieces and writes masks and rewards."""
  tokens = np.concatenate([part.ids for part in encoded])
  firsts = np.cumsum([0] + [len(part.ids) for part in encoded])
  action_mask = np.zeros(len(tokens), bool)
  step_mask = np.zeros(len(tokens), bool)
  rewards = np.zeros(len(tokens), np.float32)
  last_of_turn: dict[int, int] = {}
  for index, piece in enumerate(pieces):
    first, end = firsts[index], firsts[index + 1]
    if piece.action == CONTEXT or first == end:
      continue
    action_mask[first:end] = True
    last_of_turn[piece.action] = end - 1
    if piece.is_end:
      continue
    # The end token can begin a step: ask with a stand-in after the text.
    follows = pieces[index + 1 : index + 3]
    ends = next((i for i, p in enumerate(follows) if p.is_end), None)
    text = piece.text if ends is None else piece.text + _END_MARK
    for start in step_starts(text, delimiters):
      at = first + np.searchsorted(encoded[index].starts, start)
      if at < end:
        step_mask[at] = True
      elif ends is not None:
        step_mask[firsts[index + 1 + ends]] = True
  if granularity == "token":
    decision_mask = action_mask.copy()
  elif granularity == "step":
    decision_mask = step_mask
  else:
    decision_mask = np.zeros(len(tokens), bool)
    decision_mask[action_mask.argmax()] = action_mask.any()
  _set_rewards(trajectory, rewards, last_of_turn)
  return Tokenized(
    tokens=tokens,
    action_mask=action_mask,
    decision_mask=decision_mask,
    rewards=rewards,
    id=trajectory.id,
    problem=trajectory.problem,
  )


def _set_rewards(
  trajectory: Trajectory, rewards: np.ndarray, last_of_turn: dict[int, int]
) -> None:
  """Writes each reward on the last token of the turn that earned it."""
  if not last_of_turn:
    return
  if trajectory.turn_rewards is None:
    rewards[max(last_of_turn.values())] = trajectory.reward
    return
  for action, reward in enumerate(trajectory.turn_rewards):
    # A turn without a token of its own earns at the one before it.
    at = max(
      (i for turn, i in last_of_turn.items() if turn <= action),
      default=min(last_of_turn.values()),
    )
    rewards[at] += reward
