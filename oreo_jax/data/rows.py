"""Rows of data files: what they may look like, and how they are read.

  own          {"prompt", "response", "reward"}
               {"conversations": [{"role", "content"}, ...], "reward"}
               (see `messages` for what else a chat may hold)
               optional: "id", "problem", "truncated", "turn_rewards", "given",
               "pair": the same name in two rows makes them one preference
               "tokens", "logps": of each assistant turn, what was sampled
               "token_extras": {name: of each assistant turn, a number a token}
  TRL's types  {"prompt", "completion"}            a demonstration, reward 1
               {"prompt", "completion", "label"}   reward 1 or 0
               {"prompt", "chosen", "rejected"}    two rows, rewards 1 and 0
               {"chosen", "rejected"}              the prompt is what they share

In TRL's types, prompt and answers are each a text or a list of messages.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

from oreo_jax.data.errors import (
  BadRewardError,
  EmptyResponseError,
  MissingKeyError,
  SampledTokensError,
)
from oreo_jax.data.messages import (
  read_messages,
  read_template_args,
  read_text,
)
from oreo_jax.data.records import check_object
from oreo_jax.data.sampled import Sampled
from oreo_jax.data.schema import ASSISTANT, Pair, Trajectory, Turn

CHAT_KEYS = ("conversations", "messages")


def parse_row(row: Any, place: str) -> list[Trajectory]:
  """Returns the trajectories of one row: two of a preference, else one.

  Args:
    row: the decoded row.
    place: its file and line.

  Raises:
    TrajectoryError: a subclass says what is wrong with the row.
  """
  check_object(row, place)
  if row.get("chosen") is not None or row.get("rejected") is not None:
    return list(parse_pair(row, place))
  fields = _common_fields(row, place)
  chat_key = next((k for k in CHAT_KEYS if row.get(k) is not None), None)
  if chat_key:
    turns = read_messages(row[chat_key], chat_key, place)
    given = row.get("given") or 0
    if not isinstance(given, int) or isinstance(given, bool):
      raise MissingKeyError(place, f'"given" is {given!r}, expected an integer')
    fields |= {"is_chat": True, "given": given}
  else:
    demonstrated = row.get("response") is None and "completion" in row
    answer = _text_or_turns(
      row, "completion" if demonstrated else "response", place
    )
    turns, chat = _join(_text_or_turns(row, "prompt", place), answer, place)
    fields |= chat
  is_chat = fields.get("is_chat", False)
  fields["template_args"] = read_template_args(row, is_chat, place)
  fields["sampled"] = _sampled(row, turns, fields.get("given", 0), place)
  return [_trajectory(turns, fields, place, *_rewards(row, turns, place))]


def parse_pair(row: Any, place: str) -> Pair:
  """Returns the chosen and the rejected trajectory of a preference row."""
  check_object(row, place)
  chosen, rejected = (
    _text_or_turns(row, k, place) for k in ("chosen", "rejected")
  )
  if row.get("prompt") is not None:
    prompt = _text_or_turns(row, "prompt", place)
  else:
    prompt, chosen, rejected = _shared_prompt(chosen, rejected, place)
  fields = _common_fields(row, place)
  pair = []
  for name, answer, reward in (
    ("chosen", chosen, 1.0),
    ("rejected", rejected, 0.0),
  ):
    turns, chat = _join(prompt, answer, place)
    named = fields | chat | {"id": f"{fields['id']}/{name}"}
    is_chat = named.get("is_chat", False)
    named["template_args"] = read_template_args(row, is_chat, place)
    # Named by the row and not by its id, which rows of one prompt may share.
    named["pair"] = os.path.basename(place)
    pair.append(_trajectory(turns, named, place, reward, None))
  return Pair(*pair)


def _trajectory(
  turns: tuple[Turn, ...],
  fields: dict[str, Any],
  place: str,
  reward: float,
  turn_rewards: tuple[float, ...] | None,
) -> Trajectory:
  given = fields.get("given", 0)
  if not _count_actions(turns, given):
    raise EmptyResponseError(place, "there is no assistant turn")
  return Trajectory(
    turns=turns, reward=reward, turn_rewards=turn_rewards, **fields
  )


def _common_fields(row: Mapping[str, Any], place: str) -> dict[str, Any]:
  truncated = row.get("truncated")
  if truncated is not None and not isinstance(truncated, bool):
    raise MissingKeyError(
      place, f'"truncated" is {truncated!r}, expected true or false'
    )
  return {
    "problem": _label(row, "problem", place),
    "id": _label(row, "id", place) or os.path.basename(place),
    "truncated": bool(truncated),
    "pair": _label(row, "pair", place),
    "source": place,
  }


def _rewards(
  row: Mapping[str, Any], turns: tuple[Turn, ...], place: str
) -> tuple[float, tuple[float, ...] | None]:
  """Returns the reward of a row and those of its turns, if given."""
  label = row.get("label")
  if "reward" not in row and label is not None:
    if not isinstance(label, bool | numbers.Integral) or label not in (0, 1):
      raise BadRewardError(place, f'"label" is {label!r}, not true or false')
    return float(label), None
  if row.get("turn_rewards") is None:
    if "reward" in row:
      return _number(row["reward"], "reward", place), None
    if row.get("completion") is not None:
      return 1.0, None
    raise MissingKeyError(place, '"reward" is missing')
  actions = _count_actions(turns, row.get("given") or 0)
  values = row["turn_rewards"]
  if not isinstance(values, Sequence) or len(values) != actions:
    raise BadRewardError(
      place, f'"turn_rewards" needs {actions} numbers, one an assistant turn'
    )
  turn_rewards = tuple(_number(v, "turn_rewards", place) for v in values)
  total = math.fsum(turn_rewards)
  if row.get("reward") is None:
    return total, turn_rewards
  reward = _number(row["reward"], "reward", place)
  if not math.isclose(total, reward, rel_tol=1e-6, abs_tol=1e-6):
    raise BadRewardError(
      place, f'"reward" {reward} is not the sum {total} of "turn_rewards"'
    )
  return reward, turn_rewards


def _sampled(
  row: Mapping[str, Any], turns: tuple[Turn, ...], given: int, place: str
) -> tuple[Sampled, ...] | None:
  """Returns the recorded tokens of a row, if it has any."""
  extras = row.get("token_extras")
  if extras is None:
    extras = {}
  if not isinstance(extras, Mapping):
    raise SampledTokensError(
      place,
      f'"token_extras" is {type(extras).__name__}, expected lists by name',
    )
  lists = {"tokens": row.get("tokens"), "logps": row.get("logps"), **extras}
  # Tables have every column in every row: null stands for nothing.
  lists = {name: turn for name, turn in lists.items() if turn is not None}
  if "tokens" not in lists:
    if lists:
      names = ", ".join(f'"{name}"' for name in lists)
      raise SampledTokensError(place, f'{names} without "tokens"')
    return None
  count = _count_actions(turns, given)
  for name, of_turns in lists.items():
    if not isinstance(of_turns, Sequence) or len(of_turns) != count:
      raise SampledTokensError(
        place, f'"{name}" needs {count} lists, one an assistant turn'
      )
  try:
    return tuple(
      Sampled(
        lists["tokens"][turn],
        lists["logps"][turn] if "logps" in lists else None,
        {name: lists[name][turn] for name in extras if name in lists},
      )
      for turn in range(count)
    )
  except ValueError as error:
    raise SampledTokensError(place, str(error)) from error


def _count_actions(turns: tuple[Turn, ...], given: int) -> int:
  return sum(turn.is_action for turn in turns[given:])


def _number(value: Any, key: str, place: str) -> float:
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  try:
    if number and math.isfinite(value):
      return float(value)
  except OverflowError:  # An integer beyond every float.
    pass
  shown = repr(value)
  shown = shown if len(shown) <= 40 else shown[:40] + "..."
  raise BadRewardError(place, f'"{key}" is {shown}, not a finite number')


def _text_or_turns(
  row: Mapping[str, Any], key: str, place: str
) -> str | tuple[Turn, ...]:
  """Returns a text, or the turns of a list of messages."""
  value = row.get(key)
  if value is None or isinstance(value, str):
    return read_text(row, key, place)
  return read_messages(value, key, place)


def _join(
  prompt: str | tuple[Turn, ...], answer: str | tuple[Turn, ...], place: str
) -> tuple[tuple[Turn, ...], dict[str, Any]]:
  """Returns the turns of a prompt and its answer, and the fields of a chat."""
  if isinstance(prompt, str) and isinstance(answer, str):
    return (Turn("user", prompt), Turn(ASSISTANT, answer)), {}
  if isinstance(prompt, str) or isinstance(answer, str):
    raise MissingKeyError(
      place, "prompt and answer must both be texts, or both lists of messages"
    )
  return prompt + answer, {"is_chat": True, "given": len(prompt)}


def _shared_prompt(chosen: Any, rejected: Any, place: str) -> tuple:
  """Splits what two answers have in common off as their prompt."""
  if isinstance(chosen, str) != isinstance(rejected, str):
    raise MissingKeyError(
      place, '"chosen" and "rejected" must both be texts, or both messages'
    )
  if chosen == rejected:
    raise MissingKeyError(
      place, '"prompt" is missing, and the two answers are the same'
    )
  shared = 0
  for a, b in zip(chosen, rejected, strict=False):
    if a != b:
      break
    shared += 1
  if isinstance(chosen, str) and max(len(chosen), len(rejected)) > shared:
    # A word that both answers merely begin alike belongs to the answers.
    cut = max(chosen.rfind(c, 0, shared) for c in " \n") + 1
    shared = min(cut, shared) if cut else 0
  if not shared:
    raise MissingKeyError(
      place, '"prompt" is missing, and the two answers share no beginning'
    )
  return chosen[:shared], chosen[shared:], rejected[shared:]


def _label(row: Mapping[str, Any], key: str, place: str) -> str:
  """Returns an optional name, which may be written as a number."""
  value = row.get(key)
  return "" if value is None else read_text({key: str(value)}, key, place)
