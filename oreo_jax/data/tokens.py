"""From trajectories to tokens with exact masks.

Prompt and response meet at a token boundary. Where a step ends is asked of the
caller, who tells it by the token ids, as the sampler does: a step ends with a
token, and the next token begins the next step.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from oreo_jax.config import GRANULARITIES
from oreo_jax.data import errors
from oreo_jax.data.chat import CONTEXT, Piece
from oreo_jax.data.encoding import Encoded, encode_plans, make_plan
from oreo_jax.data.sampled import BEHAVIOUR_LOGPS
from oreo_jax.data.schema import Trajectory

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# Trajectories tokenised at once.
CHUNK = 1024
# Takes the token ids of one assistant turn, i32[L], without its end token, and
# returns bool[L]: the tokens in which a step ends.
StepEnds = Callable[[np.ndarray], np.ndarray]


class Tokenized(NamedTuple):
  """A trajectory in tokens; every array has shape [L], aligned on the token.

  `extras` holds any more arrays of this kind by name: they travel into the
  batch with the tokens they belong to. Those of a policy's sampled tokens are
  zero on all other tokens.
  """

  tokens: np.ndarray  # i32
  action_mask: np.ndarray  # bool: the policy produced this token
  decision_mask: np.ndarray  # bool: an action starts with this token
  rewards: np.ndarray  # f32: reward a token
  id: str = ""
  problem: str = ""
  extras: dict[str, np.ndarray] = {}  # the default is never written to


def map_tokens(
  function: Callable[..., np.ndarray], *sequences: Tokenized
) -> Tokenized:
  """Applies a function to each array of the sequences, extras included.

  Args:
    function: takes the same array of every sequence, returns the new one.
    *sequences: with extras of the same names.

  Returns:
    The new sequence, named as the first of them.
  """
  first = sequences[0]
  return first._replace(
    tokens=function(*(s.tokens for s in sequences)),
    action_mask=function(*(s.action_mask for s in sequences)),
    decision_mask=function(*(s.decision_mask for s in sequences)),
    rewards=function(*(s.rewards for s in sequences)),
    extras={
      name: function(*(s.extras[name] for s in sequences))
      for name in first.extras
    },
  )


def tokenize_trajectory(
  trajectory: Trajectory,
  tokenizer: PreTrainedTokenizerBase,
  *,
  granularity: str = "token",
  step_ends: StepEnds | None = None,
  max_length: int | None = None,
) -> Tokenized:
  """Tokenises one trajectory; see `tokenize_trajectories`."""
  sequences = tokenize_trajectories(
    [trajectory],
    tokenizer,
    granularity=granularity,
    step_ends=step_ends,
    max_length=max_length,
  )
  if not sequences:
    raise _no_action(trajectory)
  return sequences[0]


def tokenize_trajectories(
  trajectories: Sequence[Trajectory],
  tokenizer: PreTrainedTokenizerBase,
  *,
  granularity: str = "token",
  step_ends: StepEnds | None = None,
  max_length: int | None = None,
  on_error: str = "raise",
  on_long: str = "raise",
  skipped: collections.Counter[str] | None = None,
) -> list[Tokenized]:
  """Tokenises trajectories with their action and decision masks.

  Plain text is the beginning-of-sequence token if the tokenizer has one, the
  prompt, the response and, unless truncated, the end-of-sequence token as the
  last action. A chat is what the chat template makes of it. An action whose
  sampled tokens are recorded has exactly those: an end token that was not
  sampled is no action. What is recorded of each token goes into `extras`; the
  log-probabilities, as "behaviour_logps", if all trajectories have them.

  Args:
    trajectories: to tokenise.
    tokenizer: a fast tokenizer.
    granularity: what one action is: a "token", a "step", a "turn" of the
      assistant's, or the "response", all turns together.
    step_ends: where the steps of a turn end; the granularity "step" needs it.
      The turn's first token, every token after the end of a step, and the end
      token are decisions. The end token always is one, with turns as well, so
      that the value of a finished answer is trained.
    max_length: most tokens a sequence may have.
    on_error: "raise", or "skip" to drop chats that the template cannot render
      and prompts that have no token or fill `max_length`, and log the counts.
    on_long: the same for a prompt that fits with a response that does not.
    skipped: takes the number of dropped trajectories by kind, the `kind` of
      their error in `errors`; the counts are logged in any case.

  Returns:
    The sequences, in order. A trajectory that was cut off before its first
    token has nothing to train on; it is always dropped and counted.

  Raises:
    TemplateError: the chat template refuses or rewrites the turns.
    SampledTokensError: recorded tokens do not spell the text.
    PromptLengthError: the prompt has no token or leaves no room.
    SequenceLengthError: the sequence is longer than `max_length`.
    ValueError: an option is unknown, or the tokenizer lacks what it takes.
  """
  if granularity not in GRANULARITIES:
    raise ValueError(
      f"granularity is {granularity!r}, expected one of {GRANULARITIES}"
      " (--config.train.granularity)"
    )
  if granularity == "step" and step_ends is None:
    raise ValueError(
      'granularity is "step", but step_ends is None; pass what says where a'
      " step ends, as `oreo_jax.decode.step_ends` does of a stops automaton"
    )
  errors.check_choice(on_long, "on_long")
  all_have_logps = all(
    trajectory.sampled is not None
    and all(turn.logps is not None for turn in trajectory.sampled)
    for trajectory in trajectories
  )
  counts: collections.Counter[str] = collections.Counter()
  plans = errors.keep_good(
    trajectories,
    lambda trajectory: [make_plan(trajectory, tokenizer)],
    on_error=on_error,
    skipped=counts,
  )
  sequences: list[Tokenized] = []
  for start in range(0, len(plans), CHUNK):
    chunk = plans[start : start + CHUNK]
    for trajectory, pieces, encoded in encode_plans(chunk, tokenizer):
      sequence = _assemble(trajectory, pieces, encoded, granularity, step_ends)
      if not all_have_logps:
        sequence.extras.pop(BEHAVIOUR_LOGPS, None)
      error = _length_error(trajectory, sequence, max_length)
      if error is None:
        sequences.append(sequence)
        continue
      too_long = isinstance(error, errors.SequenceLengthError)
      may_raise = not isinstance(error, errors.EmptyResponseError)
      if may_raise and (on_long if too_long else on_error) == "raise":
        raise error
      errors.count_skipped(error, counts)
  errors.log_skipped(counts, len(sequences))
  if skipped is not None:
    skipped.update(counts)
  return sequences


def _no_action(trajectory: Trajectory) -> errors.EmptyResponseError:
  return errors.EmptyResponseError(
    trajectory.place, "the answer was cut off before its first token"
  )


def _length_error(
  trajectory: Trajectory, sequence: Tokenized, max_length: int | None
) -> errors.TrajectoryError | None:
  """Returns what is wrong with the length of a sequence, if anything."""
  length = len(sequence.tokens)
  prompt = int(sequence.action_mask.argmax())
  place = trajectory.place
  if not sequence.action_mask.any():
    return _no_action(trajectory)
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
  step_ends: StepEnds | None,
) -> Tokenized:
  """Joins the tokens of the pieces and writes masks and rewards."""
  tokens = np.concatenate([tokenized.ids for tokenized in encoded])
  edges = np.cumsum([0] + [len(tokenized.ids) for tokenized in encoded])
  action_mask = np.zeros(len(tokens), bool)
  decision_mask = np.zeros(len(tokens), bool)
  rewards = np.zeros(len(tokens), np.float32)
  last_of_turn: dict[int, int] = {}
  for index, piece in enumerate(pieces):
    first, end = edges[index], edges[index + 1]
    if piece.action == CONTEXT or first == end:
      continue
    action_mask[first:end] = True
    begins = piece.action not in last_of_turn
    last_of_turn[piece.action] = end - 1
    if granularity == "token":
      decision_mask[first:end] = True
    elif granularity == "turn":
      decision_mask[first] = begins or piece.is_end
    elif granularity == "step" and step_ends is not None:
      # To stop is an action of its own, also in the middle of a line.
      decision_mask[first:end] = piece.is_end or _first_tokens(
        tokens[first:end], step_ends
      )
  if granularity == "response" and action_mask.any():
    decision_mask[action_mask.argmax()] = True
  _set_rewards(trajectory, rewards, last_of_turn)
  return Tokenized(
    tokens=tokens,
    action_mask=action_mask,
    decision_mask=decision_mask,
    rewards=rewards,
    id=trajectory.id,
    problem=trajectory.problem,
    extras=_join_extras(encoded),
  )


def _join_extras(encoded: Sequence[Encoded]) -> dict[str, np.ndarray]:
  """Returns the extras of all tokens; zero where a piece has none."""
  names = dict.fromkeys(
    name for tokenized in encoded for name in tokenized.extras
  )
  return {
    name: np.concatenate(
      [
        tokenized.extras.get(name, np.zeros(len(tokenized.ids), np.float32))
        for tokenized in encoded
      ]
    )
    for name in names
  }


def _first_tokens(ids: np.ndarray, step_ends: StepEnds) -> np.ndarray:
  """Returns bool[L], the tokens of a turn that begin a step."""
  ends = np.asarray(step_ends(ids))
  if ends.shape != ids.shape or ends.dtype != bool:
    raise ValueError(
      f"step_ends returned {ends.dtype}{list(ends.shape)} for {len(ids)}"
      f" tokens; expected bool[{len(ids)}]"
    )
  # The first token begins the first step, whatever comes before it.
  return np.concatenate([[True], ends[:-1]])


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
