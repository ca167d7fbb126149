"""Tokenising the pieces of trajectories so that no token crosses an action.

The tokens of plain text are those of the prompt and those of the response,
each by itself. A chat is tokenised as a whole, as the chat template does it;
only where a token would cross the edge of an action, piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from oreo_jax.data.chat import CONTEXT, Piece, chat_pieces, render_chat
from oreo_jax.data.schema import Trajectory, Turn

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
  """Tokens of a text and the characters at which they start."""

  ids: np.ndarray  # i32
  starts: np.ndarray  # i64, not decreasing


class Plan(NamedTuple):
  """A trajectory and the pieces of its text."""

  trajectory: Trajectory
  pieces: list[Piece]
  lacks_end: bool  # the end-of-sequence token is still to come


def make_plan(
  trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase
) -> Plan:
  """Takes a trajectory apart into context and actions."""
  if trajectory.is_chat:
    return Plan(trajectory, *chat_pieces(trajectory, tokenizer))
  prompt, response = (turn.content for turn in trajectory.turns)
  pieces = [Piece(prompt, CONTEXT), Piece(response, 0)]
  return Plan(trajectory, pieces, not trajectory.truncated)


def encode_plans(
  plans: Sequence[Plan], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Trajectory, list[Piece], list[Encoded]]]:
  """Returns the pieces of every trajectory, and the tokens of every piece.

  Special tokens that are not in the text come as pieces without text.
  """
  whole = _encode(
    ["".join(p.text for p in ps) for t, ps, _ in plans if t.is_chat], tokenizer
  )
  chats = [i for i, plan in enumerate(plans) if plan.trajectory.is_chat]
  split = {
    i: _split(encoded, plans[i].pieces)
    for i, encoded in zip(chats, whole, strict=True)
  }
  # Plain texts, and chats in which a token crosses the edge of an action, are
  # tokenised piece by piece; a prompt that many trajectories share, once.
  texts = list(
    dict.fromkeys(
      piece.text
      for index, (_, pieces, _) in enumerate(plans)
      if split.get(index) is None
      for piece in pieces
    )
  )
  by_text = dict(zip(texts, _encode(texts, tokenizer), strict=True))
  chunk = []
  for index, (trajectory, pieces, lacks_end) in enumerate(plans):
    encoded = split.get(index)
    if encoded is None:
      encoded = [by_text[piece.text] for piece in pieces]
    if not trajectory.is_chat:
      pieces, encoded = _add_bos(pieces, encoded, tokenizer)
    if lacks_end:
      pieces, encoded = _add_eos(trajectory, pieces, encoded, tokenizer)
    chunk.append((trajectory, pieces, encoded))
  return chunk


def tokenize_prompt(
  prompt: str | Sequence[Turn], tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
  """Returns i32[L], the tokens to sample an answer from.

  Plain text gets the beginning-of-sequence token, turns go through the chat
  template with its generation prompt: as in the trajectories trained on.
  """
  if not isinstance(prompt, str):
    text = render_chat(prompt, tokenizer, "the prompt", ask=True)
    return _encode([text], tokenizer)[0].ids
  pieces = [Piece(prompt, CONTEXT)]
  _, encoded = _add_bos(pieces, _encode([prompt], tokenizer), tokenizer)
  return np.concatenate([part.ids for part in encoded])


def _add_bos(
  pieces: list[Piece],
  encoded: list[Encoded],
  tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Piece], list[Encoded]]:
  """Puts the beginning-of-sequence token first, unless it is there."""
  bos = tokenizer.bos_token_id
  if bos is None or (len(encoded[0].ids) and encoded[0].ids[0] == bos):
    return pieces, encoded
  return [Piece("", CONTEXT), *pieces], [_single(bos), *encoded]


def _add_eos(
  trajectory: Trajectory,
  pieces: list[Piece],
  encoded: list[Encoded],
  tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Piece], list[Encoded]]:
  """Puts the end-of-sequence token last, in a piece of its own.

  If the response ends with that token already, it is split off.
  """
  eos = tokenizer.eos_token_id
  if eos is None:
    raise ValueError(
      f"trajectory {trajectory.place} ends, but the tokenizer has no EOS"
      " token; use one that has, or mark the trajectory as truncated"
    )
  last = encoded[-1]
  if len(last.ids) and last.ids[-1] == eos:
    encoded = [*encoded[:-1], Encoded(last.ids[:-1], last.starts[:-1])]
  end = Piece("", pieces[-1].action, is_end=True)
  return [*pieces, end], [*encoded, _single(eos)]


def _single(token: int) -> Encoded:
  return Encoded(np.array([token], np.int32), np.zeros(1, np.int64))


def _encode(
  texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded]:
  """Tokenises texts as they are, with the character each token starts at."""
  if not texts:
    return []
  if not tokenizer.is_fast:
    raise ValueError(
      f"{type(tokenizer).__name__} gives no character offsets; use a fast"
      " tokenizer (--config.data.tokenizer)"
    )
  output = tokenizer(
    texts,
    add_special_tokens=False,
    return_offsets_mapping=True,
    return_attention_mask=False,
    return_token_type_ids=False,
    verbose=False,
  )
  encoded = []
  for ids, offsets in zip(
    output["input_ids"], output["offset_mapping"], strict=True
  ):
    offsets = np.asarray(offsets, np.int64).reshape(-1, 2)
    starts = offsets[:, 0].copy()
    ends = np.concatenate([[0], offsets[:-1, 1]])
    # Some tokenizers leave a token's own leading space out of its offsets.
    for index in np.flatnonzero(starts > ends):
      if tokenizer.convert_ids_to_tokens(ids[index])[:1] in ("Ġ", "▁", " "):
        starts[index] = ends[index]
    encoded.append(Encoded(np.asarray(ids, np.int32), starts))
  return encoded


def _split(encoded: Encoded, pieces: Sequence[Piece]) -> list[Encoded] | None:
  """Shares the tokens of a text among its pieces, or None if one straddles."""
  edges = np.cumsum([0] + [len(piece.text) for piece in pieces])
  first = np.searchsorted(encoded.starts, edges)
  inner = first[1:-1]
  if np.any(inner >= len(encoded.starts)):
    return None
  if np.any(encoded.starts[inner] != edges[1:-1]):
    return None
  return [
    Encoded(encoded.ids[low:high], encoded.starts[low:high] - edge)
    for low, high, edge in zip(first[:-1], first[1:], edges[:-1], strict=True)
  ]
