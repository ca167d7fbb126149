"""The one door between text and tokens.

Everything that turns problems into prompts, sampled tokens into answers or
trajectories into sequences goes through a `Codec`, so that sampling, training
and search agree on the chat template, the tokens that end an answer and the
places where a reasoning step ends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from oreo_jax import data
from oreo_jax.config import DataConfig
from oreo_jax.decode import Generation, stops
from oreo_jax.settings import ConfigError
from oreo_jax.tasks import Problem

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Codec:
  """A tokenizer and what this run has settled about its use.

  Attributes:
    tokenizer: a fast tokenizer.
    chat: prompt and answer go through the tokenizer's chat template.
    end_ids: tokens that end an answer; a chat model has several.
    delimiters: where a reasoning step ends, a key of `stops.DELIMITERS`.
    vocab_size: of the models, which may be larger than the tokenizer's.
  """

  tokenizer: PreTrainedTokenizerBase
  chat: bool
  end_ids: tuple[int, ...]
  delimiters: str
  vocab_size: int

  @classmethod
  def make(
    cls,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataConfig,
    vocab_size: int,
    *,
    end_ids: Iterable[int] = (),
  ) -> Codec:
    """Makes the codec of a run.

    Args:
      tokenizer: a fast tokenizer.
      settings: `chat` and `delimiters` are read.
      vocab_size: of the models.
      end_ids: tokens that end an answer besides the tokenizer's own, such as
        those that a checkpoint's generation settings name.
    """
    ends = [tokenizer.eos_token_id, *end_ids]
    if settings.chat:
      ends.append(_end_of_turn(tokenizer))
    unique = dict.fromkeys(token for token in ends if token is not None)
    return cls(
      tokenizer,
      settings.chat,
      tuple(unique),
      settings.delimiters,
      vocab_size,
    )

  @functools.cached_property
  def stops(self) -> stops.Stops:
    """Returns the automaton that says where a step ends, made once."""
    delimiters = stops.DELIMITERS[self.delimiters]
    return stops.make_stops(self.tokenizer, delimiters, self.vocab_size)

  def step_ends(self, tokens: np.ndarray) -> np.ndarray:
    """Returns bool[n]: which tokens i32[n] of an answer end a step."""
    return stops.step_ends(self.stops, tokens)

  def prompts(self, problems: Sequence[Problem]) -> list[np.ndarray]:
    """Returns i32[L] a problem: the tokens an answer is sampled after.

    They are the same tokens that precede the answer in a trajectory trained on.
    """
    return [
      data.tokenize_prompt(
        [data.Turn("user", problem.prompt)] if self.chat else problem.prompt,
        self.tokenizer,
      )
      for problem in problems
    ]

  def texts(self, answers: Generation) -> list[str]:
    """Returns the text of each answer, without special tokens."""
    return [self.text(tokens) for tokens in answers.answers()]

  def text(self, tokens: np.ndarray) -> str:
    """Returns the text of some tokens, without special tokens."""
    return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

  def step_starts(self, tokens: np.ndarray) -> np.ndarray:
    """Returns i64[steps]: where the steps of an answer begin.

    Args:
      tokens: i32[n], an answer without its end token.
    """
    ended = self.step_ends(tokens)
    starts = np.flatnonzero(ended[:-1]) + 1
    return np.concatenate([[0], starts]) if len(tokens) else starts

  def trajectory(
    self,
    problem: Problem,
    response: str | Sequence[data.Turn],
    reward: float,
    **fields: Any,
  ) -> data.Trajectory:
    """Returns a response to a problem as a trajectory, a chat if `chat`.

    Args:
      problem: what was asked.
      response: the text of the answer, or a whole conversation.
      reward: what the answer earned at its end.
      **fields: further fields of `data.Trajectory`.

    Raises:
      ValueError: a conversation, but `chat` is not set.
    """
    if not isinstance(response, str):
      if not self.chat:
        raise ValueError(
          f"problem {problem.id} is answered in a conversation, which needs "
          "the tokenizer's chat template: set --config.data.chat=True"
        )
      return data.Trajectory(
        tuple(response), reward, problem=problem.id, is_chat=True, **fields
      )
    return data.Trajectory.from_text(
      problem.prompt,
      response,
      reward,
      problem=problem.id,
      is_chat=self.chat,
      **fields,
    )

  def reply_tokens(
    self, trajectory: data.Trajectory, observation: str
  ) -> np.ndarray:
    """Returns i32[n], the tokens between the last action and the next one.

    They hold what the template writes around an observation. In training the
    same tokens are in this place, which `check_played` makes sure of.

    Args:
      trajectory: a chat with its sampled tokens, up to its last action.
      observation: what the user says to it.
    """
    place = trajectory.place
    turns = [*trajectory.turns, data.Turn("user", observation)]
    text = data.render_chat(turns, self.tokenizer, place, ask=True)
    so_far = data.render_chat(trajectory.turns, self.tokenizer, place)
    tail, end = self._turn_end
    said = so_far.removesuffix(tail)
    # The turn's end token was sampled, or else the template writes it now. Any
    # special token in that place ends the turn, in training as well.
    action = (trajectory.sampled or ())[-1]
    content = trajectory.turns[-1].content
    if action.has_end(content, self.tokenizer, is_cut_off=False):
      said += end
    if not so_far.endswith(tail) or not text.startswith(said):
      raise self._rewrites()
    return data.tokenize_text(text[len(said) :], self.tokenizer)

  @functools.cached_property
  def _turn_end(self) -> tuple[str, str]:
    """Returns what the template writes behind an action: all, and the end."""
    mark = "actionmark"
    turns = [data.Turn("user", "a"), data.Turn("assistant", mark)]
    text = data.render_chat(turns, self.tokenizer, "a turn")
    tail = text[text.rindex(mark) + len(mark) :]
    last = self.tokenizer.decode([_end_of_turn(self.tokenizer)])
    # Blanks before the end token are the policy's to write.
    until, end, _ = tail.partition(str(last))
    return tail, until + end if end and not until.strip() else ""

  def check_played(
    self, trajectory: data.Trajectory, tokens: np.ndarray
  ) -> None:
    """Makes sure that training has the tokens that were played.

    Args:
      trajectory: a chat with its sampled tokens.
      tokens: i32[n], as the policy saw and said them, up to its last action.

    Raises:
      ConfigError: if it has others: some templates drop parts of earlier turns,
        or write them anew.
    """
    trained = data.tokenize_trajectory(trajectory, self.tokenizer).tokens
    if not np.array_equal(trained, tokens):
      raise self._rewrites()

  def _rewrites(self) -> ConfigError:
    return ConfigError(
      "the tokenizer's chat template writes earlier turns in another way when "
      "later ones follow, so that they would have to be read again: give the "
      "tokenizer of --config.init one that keeps them"
    )

  def tokenize(
    self,
    trajectories: Sequence[data.Trajectory],
    *,
    granularity: str = "token",
    **options: Any,
  ) -> list[data.Tokenized]:
    """Tokenises trajectories with the masks of a granularity.

    Args:
      trajectories: to tokenise.
      granularity: what one action is: "token", "step", "turn" or "response".
      **options: of `data.tokenize_trajectories`.

    Returns:
      The sequences, in order.
    """
    return data.tokenize_trajectories(
      trajectories,
      self.tokenizer,
      granularity=granularity,
      step_ends=self.step_ends,
      **options,
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
  """Returns the token that the chat template ends an assistant's turn with."""
  turns = (data.Turn("user", "a"), data.Turn("assistant", "b"))
  chat = data.Trajectory(turns, 0.0, is_chat=True)
  return int(data.tokenize_trajectory(chat, tokenizer).tokens[-1])
