r"""Cuts the final answer out of a response and unifies its spelling.

Everything here is string work of bounded cost. A response states its answer as
`#### 18` (GSM8K), `\boxed{18}` (MATH) or in a line `A: 18`; the last of them
counts, whatever came before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MARKERS = ("####", "boxed", "A:")

_BOXED = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")

_REPLACED = {
  "−": "-",
  "–": "-",
  "×": r"\times ",
  "÷": r"\div ",
  "π": r"\pi ",
  "∞": r"\infty ",
  "≤": r"\le ",
  "≥": r"\ge ",
  "°": r"^\circ ",
  "√": r"\sqrt ",
  "∪": r"\cup ",
  "∅": r"\emptyset ",
  r"\varnothing": r"\emptyset",
  r"\dfrac": r"\frac",
  r"\tfrac": r"\frac",
  r"\cfrac": r"\frac",
  r"\$": "",
  r"\(": "",
  r"\)": "",
  r"\!": "",
  r"\,": " ",
  r"\;": " ",
  r"\:": " ",
  "\\ ": " ",
  "~": " ",
  "{,}": ",",
  "$": "",
  "€": "",
  "£": "",
}
_REPLACE = re.compile(
  r"\\\\|" + "|".join(map(re.escape, sorted(_REPLACED, reverse=True)))
)
# A function that was written without its backslash, before its argument: the
# parser would read `sin` as a product of three letters.
FUNCTIONS = (
  "sin cos tan cot csc sinh cosh tanh coth arcsin arccos arctan log ln lg exp"
).split()
_BARE_FUNCTION = re.compile(
  r"(?<![\\A-Za-z])(" + "|".join([*FUNCTIONS, "sec"]) + ")"
  r"(?=\s*[\d(\\^_{|]|\s+[A-Za-z](?![A-Za-z]))"
)
_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?")
TEXT_COMMAND = r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|textrm)"
_ALL_TEXT = re.compile(TEXT_COMMAND + r"\s*\{([^{}]*)\}")
_BLANK_TEXT = re.compile(TEXT_COMMAND + r"\s*\{\s*\}")
_TEXT_FUNCTION = re.compile(
  TEXT_COMMAND + r"\s*\{\s*(" + "|".join(FUNCTIONS) + r")\s*\}"
)
_DAY_HALF = re.compile(
  rf"(?<=\d)(\s?)(?:{TEXT_COMMAND}\s*\{{(\s?))?([ap])(?:\.\s?)?m\.?\s*\}}?$",
  re.IGNORECASE,
)

# Blanks next to anything but two digits mean nothing in a formula.
_IDLE_BLANK = re.compile(r"(?<!\d) | (?!\d)")
_MIXED = re.compile(r"(?<![\d.,_^])(\d+) (\d+) ?/ ?(\d+)(?![\d.])")
_THOUSANDS = re.compile(r"(?<![\d.,_^])(?<!\d )\d{1,3}(?: \d{3})+(?! ?\d)")
# Numbers side by side. After `_`, `^` or one of the commands the first of them
# is an argument, as in `\log_2 8` and `\frac 1 2`.
_SIDE_BY_SIDE = re.compile(r"([_^]|\\(?:frac|[dt]?binom|sqrt)\s*)?\d+(?: \d+)+")


def extract_answer(
  response: str, markers: Sequence[str] = MARKERS, max_chars: int = 1000
) -> str | None:
  r"""Returns the text of the last answer stated, or None.

  Args:
    response: any text.
    markers: which of `MARKERS` count.
    max_chars: an answer longer than this is cut to `max_chars` + 1 characters,
      which tells the caller that it is too long.

  Returns:
    What follows the last `####` or `A:` on its line, or what is inside the
    last `\boxed{}`, whichever marker comes last. None if there is no marker,
    nothing after it, or the braces are not balanced.

  Example:
    >>> extract_answer("First \\boxed{3}, no: \\boxed{\\frac{1}{2}}.")
    '\\frac{1}{2}'
  """
  places = []
  if "####" in markers:
    places.append((response.rfind("####"), 4, False))
  if "boxed" in markers:
    for match in _BOXED.finditer(response):
      places.append((match.start(), len(match.group()), True))
  if "A:" in markers:
    at = response.rfind("\nA:")
    start = 0 if at < 0 and response.startswith("A:") else at + 1
    if at >= 0 or response.startswith("A:"):
      places.append((start, 2, False))
  at, length, boxed = max(places, default=(-1, 0, False))
  if at < 0:
    return None
  # Spaces before the answer do not count, within reason.
  after = response[at + length : at + length + 4 * max_chars]
  if boxed:
    answer = _inside_braces(after, is_cut=len(after) == 4 * max_chars)
  else:
    answer = after.lstrip(" \t").split("\n", 1)[0]
  answer = (answer or "").strip()[: max_chars + 1]
  return answer or None


def normalize_answer(answer: str) -> str:
  r"""Returns the answer without what changes nothing of its meaning.

  Dollar signs, thin spaces, `\left`, `\right`, a full stop at the end and a
  `\text{}` around it all go; `\dfrac` becomes `\frac`, `sin x` becomes
  `\sin x` and `10 A.M.` becomes `10 am`.
  """
  answer = _REPLACE.sub(
    lambda match: _REPLACED.get(match.group(), match.group()), answer
  )
  answer = _BLANK_TEXT.sub(" ", _SIZE.sub("", answer))
  answer = " ".join(answer.split()).rstrip(" .,;:")
  text = _ALL_TEXT.fullmatch(answer)
  answer = text[1].strip(" .,;:") if text else answer
  answer = _DAY_HALF.sub(
    lambda match: f"{match[1] or match[2] or ''}{match[3].lower()}m", answer
  )
  answer = _TEXT_FUNCTION.sub(r"\\\1 ", answer)
  return _BARE_FUNCTION.sub(r"\\\1", answer)


def drop_idle_blanks(normalized: str) -> str:
  """Returns the answer without the blanks that mean nothing.

  Blanks between two digits stay: `1 1/2` is not `11/2`, nor `1 2` the same as
  `12`. Those between groups of thousands go.
  """
  joined = _THOUSANDS.sub(lambda m: m[0].replace(" ", ""), normalized)
  return _IDLE_BLANK.sub("", joined)


def spell_for_algebra(normalized: str) -> str:
  r"""Returns the answer so that a parser that skips blanks reads it rightly.

  Mixed numbers become sums, groups of thousands are joined and other numbers
  that stand side by side become a list.

  Example:
    >>> spell_for_algebra("x = 1 1/2, 12 345")
    'x = (1+1/2), 12345'
  """
  spelled = _MIXED.sub(r"(\1+\2/\3)", normalized)
  spelled = _THOUSANDS.sub(lambda match: match[0].replace(" ", ""), spelled)
  return _SIDE_BY_SIDE.sub(
    lambda match: match[0] if match[1] else match[0].replace(" ", ", "), spelled
  )


def _inside_braces(after: str, is_cut: bool) -> str | None:
  """Returns what the first balanced braces hold, or what stands before `$`.

  Braces left open are an answer only if `after` is cut: a too long one.
  """
  body = after.lstrip()
  if not body.startswith("{"):
    return re.split(r"[$\n]", body, maxsplit=1)[0]
  depth, escaped = 0, False
  for index, character in enumerate(body):
    if escaped:
      escaped = False
    elif character == "\\":
      escaped = True
    elif character == "{":
      depth += 1
    elif character == "}":
      depth -= 1
      if depth == 0:
        return body[1:index]
  return body[1:] if is_cut else None
