"""Messages of a chat as rows hold them, and what goes with them to a template.

  {"role", "content"}, or {"from", "value"}
  "weight": 0        an assistant turn that is context: nothing is learned of it
  any other key      is kept and shown to the chat template ("tool_calls", ...)

A row may also hold "tools" and "chat_template_kwargs" for its template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from oreo_jax.data.errors import (
  EncodingError,
  MissingKeyError,
  UnsupportedKeyError,
)
from oreo_jax.data.schema import ASSISTANT, TOOLS, Turn

# Names other formats give to the same roles.
ROLE_NAMES = {"human": "user", "gpt": ASSISTANT, "model": ASSISTANT}
# An assistant turn that holds one of these may have no text.
CALLS = ("tool_calls", "function_call")
# What this project tells `apply_chat_template` itself.
OWN_ARGUMENTS = frozenset(
  [
    *("conversation", "messages", TOOLS, "documents", "chat_template"),
    *("add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
  ]
)


def read_messages(messages: Any, key: str, place: str) -> tuple[Turn, ...]:
  """Returns the turns of a list of messages.

  Args:
    messages: the value of the row's key.
    key: its name.
    place: file and line of the row.

  Raises:
    TrajectoryError: a subclass says what is wrong with the messages.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, str):
    raise MissingKeyError(
      place,
      f'"{key}" is {type(messages).__name__}, expected text or a list of'
      " messages",
    )
  return tuple(_read_message(message, key, place) for message in messages)


def read_template_args(
  row: Mapping[str, Any], is_chat: bool, place: str
) -> dict[str, Any] | None:
  """Returns what a row gives its chat template, tools among it, if anything.

  Raises:
    UnsupportedKeyError: it cannot be given to a template.
    MissingKeyError: it is of the wrong type.
  """
  tools, options = row.get(TOOLS), row.get("chat_template_kwargs")
  if isinstance(tools, str):  # Tables cannot hold objects of many shapes.
    try:
      tools = json.loads(tools)
    except ValueError as error:
      raise MissingKeyError(
        place, f'"{TOOLS}" is text, but no JSON ({error})'
      ) from error
  objects = isinstance(tools, Sequence) and all(
    isinstance(tool, Mapping) for tool in tools
  )
  if tools is not None and not objects:
    raise MissingKeyError(place, f'"{TOOLS}" must be a list of objects')
  if options is not None and not isinstance(options, Mapping):
    raise MissingKeyError(
      place,
      f'"chat_template_kwargs" is {type(options).__name__}, expected an object',
    )
  arguments = dict(options or {})
  if own := sorted(OWN_ARGUMENTS & arguments.keys()):
    raise UnsupportedKeyError(
      place, f'"chat_template_kwargs" may not set {", ".join(own)}'
    )
  if tools:
    arguments[TOOLS] = list(tools)
  if arguments and not is_chat:
    raise UnsupportedKeyError(
      place,
      f"{', '.join(map(repr, arguments))} are for a chat template, but the row"
      " is plain text",
    )
  return arguments or None


def read_text(row: Mapping[str, Any], key: str, place: str) -> str:
  """Returns the text that a row holds under a key.

  Raises:
    MissingKeyError: there is none.
    EncodingError: it cannot be written as UTF-8.
  """
  value = row.get(key)
  if value is None:
    raise MissingKeyError(place, f'"{key}" is missing')
  if not isinstance(value, str):
    raise MissingKeyError(
      place, f'"{key}" is {type(value).__name__}, expected text'
    )
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise EncodingError(place, f'"{key}" holds a lone surrogate') from error
  return value


def _read_message(message: Any, key: str, place: str) -> Turn:
  """Returns the turn of one message."""
  if not isinstance(message, Mapping):
    raise MissingKeyError(place, f'"{key}" holds a message that is no object')
  names = ("from", "value") if "from" in message else ("role", "content")
  role = read_text(message, names[0], place)
  role = ROLE_NAMES.get(role, role)
  # Tables have every key in every message: null stands for nothing.
  extra = {
    name: value
    for name, value in message.items()
    if name not in (*names, "weight") and value is not None
  }
  if message.get(names[1]) is None and any(extra.get(call) for call in CALLS):
    content = ""
  else:
    content = read_text(message, names[1], place)
  weight = message.get("weight")
  # Zero turns learning off, which it is for all but the assistant's turns.
  if weight not in (None, 0) and (weight != 1 or role != ASSISTANT):
    raise UnsupportedKeyError(
      place,
      f'the "weight" of a turn of role {role!r} is {weight!r}; it can be 0, or'
      " 1 for the assistant",
    )
  return Turn(role, content, weight != 0 or role != ASSISTANT, extra or None)
