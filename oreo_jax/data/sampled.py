"""What a policy sampled in one assistant turn, kept beside the turn's text.

Text does not tell how it was tokenised: a policy may write "ab" as "a", "b"
where the tokenizer would encode it as one token. So a trajectory that this
project samples keeps its token ids, and training uses those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

# Name under which the log-probabilities travel beside the tokens of a batch.
BEHAVIOUR_LOGPS = "behaviour_logps"

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
  """The tokens of one assistant turn as they were sampled.

  Attributes:
    tokens: i32[L], ids in order; the last one is the end token if that was
      sampled too.
    logps: f32[L], log-probability of each token under the policy that sampled
      it; None where that is unknown.
    extras: more arrays of one number a token by name, f32[L].
  """

  tokens: np.ndarray
  logps: np.ndarray | None = None
  extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    object.__setattr__(self, "tokens", _token_ids(self.tokens))
    if self.logps is not None:
      logps = _numbers(self.logps, "logps", len(self.tokens))
      object.__setattr__(self, "logps", logps)
    if BEHAVIOUR_LOGPS in self.extras:
      raise ValueError(f'"{BEHAVIOUR_LOGPS}" goes by the name "logps"')
    extras = {
      name: _numbers(values, name, len(self.tokens))
      for name, values in self.extras.items()
    }
    object.__setattr__(self, "extras", extras)

  def __eq__(self, other: object) -> bool:
    """Says whether the other holds the same numbers."""
    if not isinstance(other, Sampled):
      return NotImplemented
    ours, theirs = self.arrays(), other.arrays()
    return (
      np.array_equal(self.tokens, other.tokens)
      and ours.keys() == theirs.keys()
      and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    )

  def __hash__(self) -> int:
    """Hashes the token ids."""
    return hash(self.tokens.tobytes())

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns what goes with the tokens, by the names that batches use."""
    if self.logps is None:
      return dict(self.extras)
    return {BEHAVIOUR_LOGPS: self.logps, **self.extras}

  def has_end(
    self,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_cut_off: bool,
    has_more: bool = False,
  ) -> bool | None:
    """Says whether the last token is the end token of the turn.

    Args:
      text: of the turn, which the tokens have to spell, with special tokens or
        without.
      tokenizer: tells what tokens spell.
      is_cut_off: the turn has no end token.
      has_more: the tokens spell the text and more, such as tool calls.

    Returns:
      Whether it is, or None if the tokens do not spell the text.
    """

    def spells(tokens: np.ndarray) -> bool:
      spelt = (
        tokenizer.decode(tokens, skip_special_tokens=skip)
        for skip in (True, False)
      )
      if has_more:
        return any(text.strip() in written for written in spelt)
      return text in spelt

    if is_cut_off or not len(self.tokens):
      return False if spells(self.tokens) else None
    others, last = self.tokens[:-1], self.tokens[-1:]
    is_special = bool(tokenizer.decode(last)) and not tokenizer.decode(
      last, skip_special_tokens=True
    )
    if is_special and (spells(others) or spells(self.tokens)):
      return True
    if spells(self.tokens):
      return False
    # Some checkpoints end a turn with an added token that is not special.
    is_added = int(last[0]) in tokenizer.added_tokens_decoder
    return True if is_added and spells(others) else None


def _token_ids(tokens: object) -> np.ndarray:
  """Returns i32[L], or raises if these are no token ids."""
  ids = np.asarray(tokens)
  if ids.shape == (0,):
    return np.zeros(0, np.int32)
  if ids.ndim != 1 or ids.dtype.kind not in "iu":
    raise ValueError('"tokens" of a turn must be a list of whole numbers')
  if ids.min() < 0 or ids.max() >= 2**31:
    raise ValueError(
      f'"tokens" holds {ids.min() if ids.min() < 0 else ids.max()}, expected'
      " ids from 0 to 2^31 - 1"
    )
  return ids.astype(np.int32)


def _numbers(values: object, name: str, length: int) -> np.ndarray:
  """Returns f32[length], or raises if these are not so many numbers."""
  numbers = np.asarray(values)
  if numbers.shape != (length,):
    raise ValueError(
      f'"{name}" has the shape {list(numbers.shape)}; expected one number for'
      f" each of the {length} tokens of the turn"
    )
  if length and (
    numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all()
  ):
    raise ValueError(f'"{name}" must hold finite numbers')
  return numbers.astype(np.float32)
