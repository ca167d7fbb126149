"""Tokenising the pieces of trajectories so that no token crosses an action.

The tokens of plain text are those of the prompt and those of the response,
each by itself. A chat is tokenised as a whole, as the chat template does it;
only where a token would cross the edge of an action, piece by piece. Where a
trajectory holds the tokens that were sampled, those are the response's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from oreo_jax.data.chat import (
  CONTEXT,
  Piece,
  chat_pieces,
  render_chat,
  render_prompt,
)
from oreo_jax.data.errors import SampledTokensError
from oreo_jax.data.sampled import Sampled
from oreo_jax.data.schema import Trajectory, Turn

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
  """Tokens of a text and the characters at which they start."""

  ids: np.ndarray  # i32[L]
  starts: np.ndarray  # i64[L], not decreasing
  extras: Mapping[str, np.ndarray] = {}  # f32[L] by name; never written to

  def cut(self, at: int) -> tuple[Encoded, Encoded]:
    """Returns the first `at` tokens and the others."""

    def take(tokens: slice) -> Encoded:
      extras = {name: array[tokens] for name, array in self.extras.items()}
      return Encoded(self.ids[tokens], self.starts[tokens], extras)

    return take(slice(None, at)), take(slice(at, None))


class Plan(NamedTuple):
  """A trajectory and the pieces of its text."""

  trajectory: Trajectory
  pieces: list[Piece]
  lacks_end: bool  # the end-of-sequence token is still to come
  is_joined: bool  # the pieces are tokenised as one text where that works
  # Of each action, whether its end token was sampled; None: there is only text.
  ended: tuple[bool, ...] | None


def make_plan(
  trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase
) -> Plan:
  """Takes a trajectory apart into context and actions.

  Raises:
    SampledTokensError: the recorded tokens do not spell the text.
    TemplateError: the chat template refuses or rewrites the turns.
  """
  ended = _check_sampled(trajectory, tokenizer)
  if not trajectory.is_chat:
    prompt, response = (turn.content for turn in trajectory.turns)
    pieces = [Piece(prompt, CONTEXT), Piece(response, 0)]
    lacks_end = not trajectory.truncated and ended is None
    return Plan(trajectory, pieces, lacks_end, False, ended)
  first = trajectory.actions[0]
  if ended is not None and len(ended) == 1 and first:
    # The policy saw the rendered prompt and continued it. What the template
    # would write for the answer does not matter.
    text = render_prompt(trajectory, tokenizer)
    pieces = [Piece(text, CONTEXT), Piece(trajectory.response, 0)]
    return Plan(trajectory, pieces, False, False, ended)
  pieces, lacks_end = chat_pieces(trajectory, tokenizer)
  return Plan(trajectory, pieces, lacks_end and ended is None, True, ended)


def encode_plans(
  plans: Sequence[Plan], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Trajectory, list[Piece], list[Encoded]]]:
  """Returns the pieces of every trajectory, and the tokens of every piece.

  Special tokens that are not in the text come as pieces without text.
  """
  joined = [index for index, plan in enumerate(plans) if plan.is_joined]
  texts = ["".join(piece.text for piece in plans[i].pieces) for i in joined]
  split = {
    index: _split(encoded, plans[index].pieces)
    for index, encoded in zip(joined, _encode(texts, tokenizer), strict=True)
  }
  # Plain texts, and chats in which a token crosses the edge of an action, are
  # tokenised piece by piece; a prompt that many trajectories share, once.
  texts = list(
    dict.fromkeys(
      piece.text
      for index, plan in enumerate(plans)
      if split.get(index) is None
      for piece in plan.pieces
    )
  )
  by_text = dict(zip(texts, _encode(texts, tokenizer), strict=True))
  chunk = []
  for index, plan in enumerate(plans):
    pieces, encoded = plan.pieces, split.get(index)
    if encoded is None:
      encoded = [by_text[piece.text] for piece in pieces]
    if plan.ended is not None:
      recorded = plan.trajectory.sampled or ()
      pieces, encoded = _use_sampled(pieces, encoded, recorded, plan.ended)
    if not plan.trajectory.is_chat:
      pieces, encoded = _add_bos(pieces, encoded, tokenizer)
    if plan.lacks_end:
      pieces, encoded = _add_eos(plan.trajectory, pieces, encoded, tokenizer)
    chunk.append((plan.trajectory, pieces, encoded))
  return chunk


def _check_sampled(
  trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase
) -> tuple[bool, ...] | None:
  """Says of each action whether its end token was sampled.

  Returns:
    One bool an action, or None if the trajectory has no recorded tokens.

  Raises:
    SampledTokensError: the recorded tokens do not spell the text.
  """
  if trajectory.sampled is None:
    return None
  ended = []
  last = trajectory.actions[-1]
  for turn, sampled in zip(trajectory.actions, trajectory.sampled, strict=True):
    has_end = sampled.has_end(
      trajectory.turns[turn].content,
      tokenizer,
      is_cut_off=trajectory.truncated and turn == last,
      has_more=bool(trajectory.turns[turn].extra),
    )
    if has_end is None:
      raise SampledTokensError(
        trajectory.place,
        f"the recorded tokens of turn {turn + 1} spell"
        f" {_shorten(str(tokenizer.decode(sampled.tokens)))}, but its text is"
        f" {_shorten(trajectory.turns[turn].content)}",
      )
    ended.append(has_end)
  return tuple(ended)


def _shorten(text: str, length: int = 60) -> str:
  return repr(text if len(text) <= length else text[:length] + "...")


def _use_sampled(
  pieces: Sequence[Piece],
  encoded: Sequence[Encoded],
  recorded: Sequence[Sampled],
  ended: Sequence[bool],
) -> tuple[list[Piece], list[Encoded]]:
  """Puts the recorded tokens of every action in the place of its text's."""
  pairs = []
  for piece, tokenized in zip(pieces, encoded, strict=True):
    if piece.action == CONTEXT:
      pairs.append((piece, tokenized))
    elif not piece.is_end:
      sampled = recorded[piece.action]
      length = len(sampled.tokens)
      turn = Encoded(
        sampled.tokens, np.zeros(length, np.int64), sampled.arrays()
      )
      response, end = turn.cut(length - ended[piece.action])
      pairs.append((piece, response))
      if ended[piece.action]:
        pairs.append((Piece("", piece.action, is_end=True), end))
    elif not ended[piece.action] and piece.action < len(ended) - 1:
      # The template wrote this end token, not the policy. Later turns follow
      # it, so it has to stay, but nothing is learned from it.
      pairs.append((piece._replace(action=CONTEXT, is_end=False), tokenized))
  pieces, tokens_of_pieces = zip(*pairs, strict=True)
  return list(pieces), list(tokens_of_pieces)


def tokenize_prompt(
  prompt: str | Sequence[Turn],
  tokenizer: PreTrainedTokenizerBase,
  *,
  template_args: Mapping[str, Any] | None = None,
) -> np.ndarray:
  """Returns i32[L], the tokens to sample an answer from.

  Plain text gets the beginning-of-sequence token, turns go through the chat
  template with its generation prompt: as in the trajectories trained on.

  Args:
    prompt: a text, or the turns of a chat.
    tokenizer: with a chat template if the prompt is turns.
    template_args: what else the chat template gets, such as "tools".
  """
  if not isinstance(prompt, str):
    text = render_chat(
      prompt, tokenizer, "the prompt", ask=True, template_args=template_args
    )
    return _encode([text], tokenizer)[0].ids
  pieces = [Piece(prompt, CONTEXT)]
  _, encoded = _add_bos(pieces, _encode([prompt], tokenizer), tokenizer)
  return np.concatenate([tokenized.ids for tokenized in encoded])


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
  """Returns i32[L], the tokens of a text as it is, without others around it."""
  return _encode([text], tokenizer)[0].ids


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
    encoded = [*encoded[:-1], last.cut(-1)[0]]
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
    # Some tokenizers leave a token's own leading space out of its offsets: the
    # token then seems to start later than the one before it ends. A token that
    # carries a mark for a space starts where the other one ends.
    for index in np.flatnonzero(starts > ends):
      if tokenizer.convert_ids_to_tokens(ids[index])[:1] in ("Ġ", "▁", " "):
        starts[index] = ends[index]
    encoded.append(Encoded(np.asarray(ids, np.int32), starts))
  return encoded


def _split(encoded: Encoded, pieces: Sequence[Piece]) -> list[Encoded] | None:
  """Shares the tokens of a text among its pieces, or None if one straddles.

  A piece gets the tokens that start within it. That is exact if some token
  starts at every edge between two pieces; otherwise a token holds characters of
  both, and would be an action and context at once.
  """
  edges = np.cumsum([0] + [len(piece.text) for piece in pieces])
  first = np.searchsorted(encoded.starts, edges)
  # A piece without text at the end starts where the text ends.
  starts = np.append(encoded.starts, edges[-1])
  if np.any(starts[first[1:-1]] != edges[1:-1]):
    return None
  return [
    Encoded(encoded.ids[low:high], encoded.starts[low:high] - edge)
    for low, high, edge in zip(first[:-1], first[1:], edges[:-1], strict=True)
  ]
