"""The trajectory: what was asked, what was answered, what it earned."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from oreo_jax.data.sampled import Sampled

ASSISTANT = "assistant"
TOOLS = "tools"


class Turn(NamedTuple):
  """One message of a trajectory."""

  role: str
  content: str
  is_learned: bool = True  # False: context, even if the assistant wrote it
  extra: Mapping[str, Any] | None = None  # more keys that a template reads

  @property
  def is_action(self) -> bool:
    """Says whether the policy is to learn this turn."""
    return self.role == ASSISTANT and self.is_learned

  def message(self) -> dict[str, Any]:
    """Returns the message that a chat template takes."""
    message = {"role": self.role, "content": self.content}
    return message | dict(self.extra or {})


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """One rewarded attempt at one problem.

  Attributes:
    turns: the messages in order; those of role `assistant` are the actions,
      unless they are marked as not to be learned.
    reward: terminal reward.
    turn_rewards: one reward an action; `reward` is then their sum.
    problem: groups the attempts at one problem; the prompt text by default.
    id: name of this attempt.
    truncated: the last action was cut off, so that it has no end token.
    is_chat: the turns go through the tokenizer's chat template. Otherwise
      there are two turns, joined as they are.
    given: so many turns at the start are context, the assistant's too.
    pair: names the preference that this attempt and another one, of higher or
      lower reward, come from; empty for an attempt that stands alone.
    template_args: what the chat template gets besides the turns, such as
      "tools"; None for nothing.
    sampled: the tokens of each action as the policy sampled them; None where
      there is only text.
    source: file and line the trajectory came from, for error messages.
  """

  turns: tuple[Turn, ...]
  reward: float
  turn_rewards: tuple[float, ...] | None = None
  problem: str = ""
  id: str = ""
  truncated: bool = False
  is_chat: bool = False
  given: int = 0
  pair: str = ""
  template_args: Mapping[str, Any] | None = dataclasses.field(
    default=None, hash=False
  )
  sampled: tuple[Sampled, ...] | None = None
  source: str = dataclasses.field(default="", compare=False)

  def __post_init__(self):
    actions = self.actions
    if not actions:
      raise ValueError(f"trajectory {self.place} has no assistant turn")
    roles = [turn.role for turn in self.turns]
    if not self.is_chat and roles != ["user", ASSISTANT]:
      raise ValueError(
        f"trajectory {self.place} is plain text but its turns are {roles};"
        " expected ['user', 'assistant'], or is_chat=True"
      )
    if self.turn_rewards is not None:
      total = math.fsum(self.turn_rewards)
      if len(self.turn_rewards) != len(actions) or not math.isclose(
        total, self.reward, rel_tol=1e-6, abs_tol=1e-6
      ):
        raise ValueError(
          f"trajectory {self.place} has {len(actions)} assistant turns and"
          f" reward {self.reward}; turn_rewards {self.turn_rewards} must be"
          " one number a turn with that sum"
        )
    if self.sampled is not None and len(self.sampled) != len(actions):
      raise ValueError(
        f"trajectory {self.place} has {len(actions)} assistant turns, but the"
        f" sampled tokens of {len(self.sampled)}"
      )
    if len({frozenset(turn.arrays()) for turn in self.sampled or ()}) > 1:
      raise ValueError(
        f"trajectory {self.place}: log-probabilities and extras of sampled"
        " tokens must be there for all of its turns or for none"
      )
    if not self.problem:
      object.__setattr__(self, "problem", self.prompt)

  @classmethod
  def from_text(
    cls, prompt: str, response: str, reward: float, **fields: Any
  ) -> Trajectory:
    """Returns the plain trajectory of a prompt and its response."""
    turns = (Turn("user", prompt), Turn(ASSISTANT, response))
    return cls(turns=turns, reward=float(reward), **fields)

  @property
  def actions(self) -> list[int]:
    """Indices of the turns that the policy produced."""
    return [
      index
      for index, turn in enumerate(self.turns)
      if turn.is_action and index >= self.given
    ]

  @property
  def prompt(self) -> str:
    """Text of the turns before the first action, one a line."""
    return "\n".join(turn.content for turn in self.turns[: self.actions[0]])

  @property
  def response(self) -> str:
    """Text of the last action."""
    return self.turns[self.actions[-1]].content

  @property
  def place(self) -> str:
    """Where an error message should point."""
    name = f"(id {self.id})" if self.id else ""
    return " ".join(word for word in (self.source, name) if word)


class Pair(NamedTuple):
  """Two attempts at one problem, the better one first."""

  chosen: Trajectory
  rejected: Trajectory


def problem_key(problem: str) -> str:
  r"""Returns what problems that differ by white space alone have in common.

  Where problems must not be torn apart, as in a split, group by this.

  >>> problem_key(" 1 +  1?\n") == problem_key("1 + 1?")
  True
  """
  return " ".join(problem.split())


def stable_hash(*values: object) -> int:
  """Returns 64 bits that depend on the values alone, on every machine."""
  digest = hashlib.blake2b(digest_size=8)
  for value in values:
    # The length in front tells ("ab", "c") from ("a", "bc").
    data = str(value).encode("utf-8", "surrogatepass")
    digest.update(len(data).to_bytes(8, "little") + data)
  return int.from_bytes(digest.digest(), "little")
