r"""Cuts the final answer out of a response and reads plain answers exactly.

Everything here is string work of bounded cost; what needs algebra is left to
`grading`. A response states its answer as `#### 18` (GSM8K), `\boxed{18}`
(MATH) or in a line `A: 18`; the last of them counts, whatever came before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

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
_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?")
_TEXT = r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|textrm)"
_WHOLE_TEXT = re.compile(_TEXT + r"\s*\{([^{}]*)\}")

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d+"
_FRACTION = r"(?P<{0}>\d+)\s*/\s*(?P<{1}>\d+)"
_LATEX_FRACTION = (
  r"\\frac\s*(?:\{{\s*(?P<{0}>\d+)\s*\}}\s*\{{\s*(?P<{1}>\d+)\s*\}}"
  r"|(?P<{2}>\d)\s*(?P<{3}>\d))"
)
_NUMBER = re.compile(
  r"(?P<sign>[-+]?)\s*(?:"
  + _FRACTION.format("n1", "d1")
  + "|"
  + rf"(?P<w2>\d+)\s+{_FRACTION.format('n2', 'd2')}"
  + "|"
  + rf"(?P<w3>\d*)\s*{_LATEX_FRACTION.format('n3', 'd3', 'n4', 'd4')}"
  + "|"
  + rf"(?P<whole>{_INTEGER})?"
  + r"(?:(?P<point>\.)(?P<digits>\d*)"
  + r"(?:\\(?:overline|bar)\s*\{(?P<repeat>\d+)\})?)?"
  + r"(?:[eE](?P<exponent>[-+]?\d{1,2}))?"
  + r")(?P<unit>.*)",
  re.DOTALL,
)
_PERCENT = re.compile(r"\s*(?:\\?%|percent)")
_UNIT = re.compile(rf"\s*{_TEXT}\s*\{{([^{{}}]*)\}}(?:\^\{{?\d\}}?)?|\s+(.*)")
_UNIT_WORDS = re.compile(r"\s*[A-Za-z]{2}[A-Za-z .]*")
# Words after a number that are no unit.
_NOT_UNITS = frozenset(
  "pi and or sqrt mod to times plus minus half dozen hundred thousand million "
  "billion trillion".split()
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")
_SUBSCRIPTED = re.compile(r"(\w+?)_\{?\s*(\w+)\s*\}?")


class PlainNumber(NamedTuple):
  """A number that was written out, not as a formula."""

  value: Fraction
  is_decimal: bool  # has a decimal point, so it may be rounded
  is_percent: bool  # `value` is before the sign: 50% has value 50


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
  `\text{}` around it all go; `\dfrac` becomes `\frac`.
  """
  answer = _REPLACE.sub(
    lambda match: _REPLACED.get(match.group(), match.group()), answer
  )
  answer = _SIZE.sub("", answer)
  answer = " ".join(answer.split()).rstrip(" .,;:")
  whole = _WHOLE_TEXT.fullmatch(answer)
  return whole[1].strip(" .,;:") if whole else answer


def plain_number(normalized: str) -> PlainNumber | None:
  r"""Reads a number that stands alone or before a unit; None if unsure.

  Understands signs, thousands separators, decimals, repeating decimals,
  exponents, `a/b`, `\frac{a}{b}`, mixed numbers and percent.

  Example:
    >>> plain_number("1,234.50 dollars")
    PlainNumber(value=Fraction(2469, 2), is_decimal=True, is_percent=False)
  """
  match = _NUMBER.fullmatch(normalized)
  if not match:
    return None
  unit, found = match["unit"], match.groupdict()
  is_percent = False
  if percent := _PERCENT.match(unit):
    is_percent, unit = True, unit[percent.end() :]
  if unit.strip() and not _is_unit(unit):
    return None
  for whole, numerator, denominator in (
    ("w0", "n1", "d1"),
    ("w2", "n2", "d2"),
    ("w3", "n3", "d3"),
    ("w3", "n4", "d4"),
  ):
    if found[numerator] is not None:
      if int(found[denominator]) == 0:
        return None
      value = Fraction(int(found[numerator]), int(found[denominator]))
      value += int(found.get(whole) or 0)
      break
  else:
    whole, digits = found["whole"], found["digits"] or ""
    if whole is None and not digits and not found["repeat"]:
      return None
    value = Fraction(int((whole or "0").replace(",", "") + digits))
    value /= 10 ** len(digits)
    if repeat := found["repeat"]:
      period = (10 ** len(repeat) - 1) * 10 ** len(digits)
      value += Fraction(int(repeat), period)
    value *= Fraction(10) ** int(found["exponent"] or 0)
  if found["sign"] == "-":
    value = -value
  is_decimal = found["point"] is not None and not found["repeat"]
  return PlainNumber(value, is_decimal, is_percent)


def compare_plainly(reference: str, answer: str) -> bool | None:
  """Compares two normalised answers; None if it takes algebra to tell.

  Decimals are compared to six places. A percentage equals both the number
  before its sign and its hundredth.
  """
  if reference.replace(" ", "") == answer.replace(" ", ""):
    return True
  one, other = plain_number(reference), plain_number(answer)
  if one and other:
    pairs = [(one.value, other.value)]
    if one.is_percent and not other.is_percent:
      pairs.append((one.value / 100, other.value))
    if other.is_percent and not one.is_percent:
      pairs.append((one.value, other.value / 100))
    places = 6 if one.is_decimal or other.is_decimal else None
    return any(
      a == b if places is None else round(a, places) == round(b, places)
      for a, b in pairs
    )
  if _WORDS.fullmatch(reference) and _WORDS.fullmatch(answer):
    return reference.casefold().split() == answer.casefold().split()
  expected, given = (_SUBSCRIPTED.fullmatch(x) for x in (reference, answer))
  if expected and given:
    return expected.groups() == given.groups()
  return None


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


def _is_unit(text: str) -> bool:
  match = _UNIT.fullmatch(text)
  if not match:
    return False
  words = match[1] if match[1] is not None else match[2]
  if not _UNIT_WORDS.fullmatch(words):
    # In \text{} even a letter alone is a unit: 5 \text{ m}.
    return match[1] is not None and words.strip(" .").isalpha()
  return _NOT_UNITS.isdisjoint(words.lower().replace(".", "").split())
