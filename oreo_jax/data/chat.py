"""Which characters of a rendered chat the policy produced.

A chat template is a program: it may add a default system message, strip
whitespace, move the system message into the first user turn, or drop parts of
earlier turns. So the place of the actions is not guessed from the text but
established and then verified: the chat is rendered once as it is and once with
each assistant content replaced by a marker. The text between the markers is the
template's own; it must be found again, in order, in the real rendering, with
the real contents in between. Otherwise there is no exact mask, and that is an
error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from oreo_jax.data.errors import TemplateError
from oreo_jax.data.schema import Trajectory, Turn

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

CONTEXT = -1


class Piece(NamedTuple):
  """A stretch of text: context, or a part of an assistant turn."""

  text: str
  action: int  # index of the assistant turn, or CONTEXT
  is_end: bool = False  # the end token of the turn


def chat_pieces(
  trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Piece], bool]:
  """Renders a chat and says which parts are actions.

  The content of an assistant turn is an action, and so are the end token that
  the template writes after it, unless the last turn is truncated, and blanks
  on the way from the generation prompt to the content and from there to the
  end token: the policy has to write them. Other text that the template adds is
  context. The chat ends with its last action.

  Args:
    trajectory: a chat.
    tokenizer: with a chat template.

  Returns:
    The pieces, whose texts join to the rendered chat, and whether the last
    turn still lacks an end token because the template writes none.

  Raises:
    TemplateError: the template refuses or rewrites the turns.
    ValueError: there is no template.
  """
  actions = trajectory.actions
  turns = trajectory.turns[: actions[-1] + 1]
  text = render_chat(turns, tokenizer, trajectory.place)
  parts, found = _locate(turns, actions, text, tokenizer, trajectory.place)

  # The token after the last action tells which token ends a turn.
  end = _leading_special(parts[-1].lstrip(), tokenizer)
  pieces = []
  before = parts[0]
  at = 0  # where `before` starts in the text
  for index, (action, content, after) in enumerate(
    zip(actions, found, parts[1:], strict=True)
  ):
    start = at + len(before)
    if action:
      prompt = render_chat(
        turns[:action], tokenizer, trajectory.place, ask=True
      )
      if at <= len(prompt) < start and text.startswith(prompt):
        if text[len(prompt) : start].isspace():
          start = len(prompt)
    pieces.append(Piece(text[at:start], CONTEXT))
    at += len(before) + len(content)
    final = index == len(actions) - 1
    blank = len(after) - len(after.lstrip())
    ends = bool(end) and after.startswith(end, blank)
    if ends and not (final and trajectory.truncated):
      pieces.append(Piece(text[start : at + blank], index))
      pieces.append(Piece(end, index, is_end=True))
      at += blank + len(end)
      before = after[blank + len(end) :]
    else:
      pieces.append(Piece(text[start:at], index))
      before = after
  # An answer without text stays: its tokens may have been recorded.
  pieces = [p for p in pieces if p.text or p.action != CONTEXT]
  return pieces, not end and not trajectory.truncated


def render_chat(
  turns: Sequence[Turn],
  tokenizer: PreTrainedTokenizerBase,
  place: str,
  *,
  ask: bool = False,
) -> str:
  """Returns the text the chat template makes of the turns.

  Args:
    turns: the messages.
    tokenizer: with a chat template.
    place: where the turns come from, for error messages.
    ask: end with the generation prompt, if the template has one.

  Raises:
    TemplateError: the template refuses the turns.
    ValueError: there is no template.
  """
  if not getattr(tokenizer, "chat_template", None):
    raise ValueError(
      f"{place} is a chat, but the tokenizer has no chat template; use a"
      " tokenizer with one, or give plain prompt and response"
    )
  messages = [turn._asdict() for turn in turns]
  try:
    text = tokenizer.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=ask
    )
    return str(text)
  except Exception as error:  # Templates raise whatever their author chose.
    roles = [turn.role for turn in turns]
    raise TemplateError(
      place, f"the chat template refuses the turns {roles} ({error})"
    ) from error


def _locate(
  turns: tuple[Turn, ...],
  actions: list[int],
  text: str,
  tokenizer: PreTrainedTokenizerBase,
  place: str,
) -> tuple[list[str], list[str]]:
  """Finds the assistant contents in the rendered text.

  Returns:
    The n + 1 stretches of the template's own text and the n contents between
    them as they stand in `text`, which may have lost outer whitespace.
  """
  contents = [turns[action].content for action in actions]
  markers = _markers(len(actions), text)
  replaced = list(turns)
  for action, marker in zip(actions, markers, strict=True):
    replaced[action] = turns[action]._replace(content=marker)
  marked = render_chat(tuple(replaced), tokenizer, place)
  if all(marked.count(marker) == 1 for marker in markers):
    parts = []
    for marker in markers:
      part, found, marked = marked.partition(marker)
      if not found:  # Turns come in another order than they were given.
        raise _rewritten(place)
      parts.append(part)
    parts.append(marked)
    matched = _match(text, parts, contents)
    if matched is not None:
      return parts, matched
  # The template treats this content unlike the marker, as those do that set
  # out <think> blocks. If it wrote the turns word for word after the
  # generation prompt, that is where they are.
  parts = _prefix_parts(turns, actions, text, tokenizer, place)
  if parts is None:
    raise _rewritten(place)
  return parts, contents


def _prefix_parts(
  turns: tuple[Turn, ...],
  actions: list[int],
  text: str,
  tokenizer: PreTrainedTokenizerBase,
  place: str,
) -> list[str] | None:
  """Splits the text at contents that directly follow a generation prompt."""
  parts, at = [], 0
  for action in actions:
    if not action:
      return None
    prompt = render_chat(turns[:action], tokenizer, place, ask=True)
    content = turns[action].content
    if len(prompt) < at or not text.startswith(prompt + content):
      return None
    parts.append(text[at : len(prompt)])
    at = len(prompt) + len(content)
  return [*parts, text[at:]]


def _match(
  text: str, parts: list[str], contents: list[str]
) -> list[str] | None:
  """Returns the contents as written between the parts, if they explain all."""
  if not text.startswith(parts[0]):
    return None
  at = len(parts[0])
  found = []
  for index, content in enumerate(contents):
    after = parts[index + 1]
    last = index == len(contents) - 1
    for written in dict.fromkeys(
      (content, content.strip(), content.lstrip(), content.rstrip())
    ):
      end = at + len(written) + len(after)
      if text[at:end] == written + after and (not last or end == len(text)):
        found.append(written)
        at = end
        break
    else:
      return None
  return found


def _markers(count: int, text: str) -> list[str]:
  """Returns words that do not occur in the text."""
  salt = 0
  while f"actionmark{salt}x" in text:
    salt += 1
  return [f"actionmark{salt}x{index}x" for index in range(count)]


def _leading_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
  """Returns the special token that a text starts with, or ''."""
  names = set(tokenizer.all_special_tokens)
  names.update(
    token.content
    for token in tokenizer.added_tokens_decoder.values()
    if token.special
  )
  return max((n for n in names if text.startswith(n)), key=len, default="")


def _rewritten(place: str) -> TemplateError:
  return TemplateError(
    place,
    "the chat template rewrites the assistant turns (it drops or changes a"
    " part of them), so that there is no exact action mask",
  )
