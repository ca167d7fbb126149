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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from oreo_jax.data.errors import TemplateError
from oreo_jax.data.schema import TOOLS, Trajectory, Turn

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

# Stands for the index of an assistant turn where there is none.
CONTEXT = -1
# The key of a message that holds calls of tools.
CALLS = "tool_calls"


class Piece(NamedTuple):
  """A stretch of text: context, or a part of an assistant turn."""

  text: str
  action: int  # index of the assistant turn, or CONTEXT
  is_end: bool = False  # the end token of the turn


class _Chat(NamedTuple):
  """What every rendering of one chat needs."""

  turns: tuple[Turn, ...]
  tokenizer: PreTrainedTokenizerBase
  place: str
  template_args: Mapping[str, Any] | None

  def render(self, turns: Sequence[Turn], *, ask: bool = False) -> str:
    """Returns the text of some turns; see `render_chat`."""
    return render_chat(
      turns,
      self.tokenizer,
      self.place,
      ask=ask,
      template_args=self.template_args,
    )

  def refusal(self, problem: str) -> TemplateError:
    """Returns the error that the chat template cannot do something."""
    return TemplateError(self.place, f"the chat template {problem}")


def chat_pieces(
  trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Piece], bool]:
  """Renders a chat and says which parts are actions.

  The content of an assistant turn is an action, and so are its tool calls, the
  end token that the template writes after it, unless the last turn is
  truncated, and blanks on the way from the generation prompt to the content
  and from there to the end token: the policy has to write them. Other text
  that the template adds is context. The chat ends with its last action.

  Args:
    trajectory: a chat.
    tokenizer: with a chat template.

  Returns:
    The pieces, whose texts join to the rendered chat, and whether the last
    turn still lacks an end token because the template writes none.

  Raises:
    TemplateError: the template refuses, rewrites or ignores a part.
    ValueError: there is no template.
  """
  actions = trajectory.actions
  chat = _Chat(
    trajectory.turns[: actions[-1] + 1],
    tokenizer,
    trajectory.place,
    trajectory.template_args,
  )
  text = chat.render(chat.turns)
  _check_honoured(chat, text)
  between, contents = _locate(chat, actions, text)

  # `between` is the template's own text around the contents: what it writes
  # after the last one starts with the token that ends a turn, if there is one.
  end = _leading_special(between[-1].lstrip(), tokenizer)
  pieces = []
  before = between[0]
  at = 0  # where `before` starts in the text
  for index, (action, content, after) in enumerate(
    zip(actions, contents, between[1:], strict=True)
  ):
    start = at + len(before)
    # The policy continues the generation prompt: blanks between that and the
    # content are for the policy to write.
    if action:
      prompt = chat.render(chat.turns[:action], ask=True)
      if at <= len(prompt) < start and text.startswith(prompt):
        if text[len(prompt) : start].isspace():
          start = len(prompt)
    pieces.append(Piece(text[at:start], CONTEXT))
    at += len(before) + len(content)
    # The policy also writes the end token and blanks in front of it.
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


def render_prompt(
  trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase
) -> str:
  """Returns the text that the policy continued with its first action.

  Raises:
    TemplateError: the template refuses or ignores a part of it.
    ValueError: there is no template.
  """
  chat = _Chat(
    trajectory.turns[: trajectory.actions[0]],
    tokenizer,
    trajectory.place,
    trajectory.template_args,
  )
  text = chat.render(chat.turns, ask=True)
  _check_honoured(chat, text, ask=True)
  return text


def render_chat(
  turns: Sequence[Turn],
  tokenizer: PreTrainedTokenizerBase,
  place: str,
  *,
  ask: bool = False,
  template_args: Mapping[str, Any] | None = None,
) -> str:
  """Returns the text the chat template makes of the turns.

  Args:
    turns: the messages.
    tokenizer: with a chat template.
    place: where the turns come from, for error messages.
    ask: end with the generation prompt, if the template has one.
    template_args: what else the template gets, such as "tools".

  Raises:
    TemplateError: the template refuses the turns.
    ValueError: there is no template.
  """
  if not getattr(tokenizer, "chat_template", None):
    raise ValueError(
      f"{place} is a chat, but the tokenizer has no chat template; use a"
      " tokenizer with one, or give plain prompt and response"
    )
  messages = [turn.message() for turn in turns]
  try:
    text = tokenizer.apply_chat_template(
      messages,
      tokenize=False,
      add_generation_prompt=ask,
      **(template_args or {}),
    )
    return str(text)
  except Exception as error:  # Templates raise whatever their author chose.
    roles = [turn.role for turn in turns]
    raise TemplateError(
      place, f"the chat template refuses the turns {roles} ({error})"
    ) from error


def _check_honoured(chat: _Chat, text: str, *, ask: bool = False) -> None:
  """Raises if the template ignores what the row gives it besides texts."""
  options = dict(chat.template_args or {})
  if options.pop(TOOLS, None):
    without = chat._replace(template_args=options)
    if without.render(chat.turns, ask=ask) == text:
      raise chat.refusal(f'ignores "{TOOLS}"')
  for name in options:
    if name not in str(chat.tokenizer.chat_template):
      raise chat.refusal(f"has no variable {name!r} of chat_template_kwargs")
  for index, turn in enumerate(chat.turns):
    if (turn.extra or {}).get(CALLS) and not _is_more_than_text(
      chat, index, text, ask=ask
    ):
      raise chat.refusal(f'ignores the "{CALLS}" of turn {index + 1}')


def _is_more_than_text(
  chat: _Chat, index: int, text: str, *, ask: bool = False
) -> bool:
  """Says whether the template writes more of a turn than its content."""
  turn = chat.turns[index]
  if not turn.extra:
    return False
  bare = turn._replace(extra=None)
  turns = (*chat.turns[:index], bare, *chat.turns[index + 1 :])
  try:
    return chat.render(turns, ask=ask) != text
  except TemplateError:  # It needs what was taken away.
    return True


def _locate(
  chat: _Chat, actions: list[int], text: str
) -> tuple[list[str], list[str]]:
  """Finds the assistant contents in the rendered text.

  Returns:
    The n + 1 stretches of the template's own text and the n contents between
    them as they stand in `text`, which may have lost outer whitespace.
  """
  contents = [chat.turns[action].content for action in actions]
  # A turn with tool calls has no content that a marker could stand for.
  if not any(_is_more_than_text(chat, action, text) for action in actions):
    markers = _markers(len(actions), text)
    replaced = list(chat.turns)
    for action, marker in zip(actions, markers, strict=True):
      replaced[action] = chat.turns[action]._replace(content=marker)
    marked = chat.render(replaced)
    if all(marked.count(marker) == 1 for marker in markers):
      between = []
      for marker in markers:
        own, _, marked = marked.partition(marker)
        between.append(own)
      between.append(marked)
      matched = _match(text, between, contents)
      if matched is not None:
        return between, matched
  # The template treats this content unlike the marker, as those do that set
  # out <think> blocks. If it wrote the turns word for word after the
  # generation prompt, that is where they are.
  return _locate_by_prompts(chat, actions, text)


def _locate_by_prompts(
  chat: _Chat, actions: list[int], text: str
) -> tuple[list[str], list[str]]:
  """Finds contents that directly follow the generation prompt of their turn.

  Of a turn that is more than a text, such as one with tool calls, all that the
  template writes up to the end token of the turn is its content.
  """
  between, contents, at = [], [], 0
  for action in actions:
    if not action:
      raise _rewritten(chat.place)
    turn = chat.turns[action]
    prompt = chat.render(chat.turns[:action], ask=True)
    start = len(prompt)
    if start < at or not text.startswith(prompt):
      raise _rewritten(chat.place)
    content = turn.content
    if _is_more_than_text(chat, action, text):
      content = text[start : _find_end(chat, action, text, start)]
    elif not text.startswith(content, start):
      raise _rewritten(chat.place)
    between.append(text[at:start])
    contents.append(content)
    at = start + len(content)
  return [*between, text[at:]], contents


def _find_end(chat: _Chat, action: int, text: str, start: int) -> int:
  """Returns where in the text the end token of a turn stands."""
  # The same turn with a plain content shows which token ends it.
  (marker,) = _markers(1, text)
  plain = Turn(chat.turns[action].role, marker)
  rendered = chat.render((*chat.turns[:action], plain))
  after = rendered.partition(marker)[2].lstrip()
  end = _leading_special(after, chat.tokenizer)
  at = text.find(end, start) if end else -1
  if at < 0:
    raise chat.refusal(
      f"writes no token that would show where turn {action + 1}, which has"
      f" {', '.join(chat.turns[action].extra or {})}, ends"
    )
  return at


def _match(
  text: str, between: list[str], contents: list[str]
) -> list[str] | None:
  """Returns the contents as written, if they explain all of the text."""
  if not text.startswith(between[0]):
    return None
  at = len(between[0])
  matched = []
  for index, content in enumerate(contents):
    after = between[index + 1]
    last = index == len(contents) - 1
    for written in dict.fromkeys(
      (content, content.strip(), content.lstrip(), content.rstrip())
    ):
      end = at + len(written) + len(after)
      if text[at:end] == written + after and (not last or end == len(text)):
        matched.append(written)
        at = end
        break
    else:
      return None
  return matched


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
    "the chat template rewrites the assistant turns (it drops or changes some"
    " of their text), so that there is no exact action mask",
  )
