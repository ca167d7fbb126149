"""Compares answers that need no algebra: numbers, units, words.

Everything here is exact and of bounded cost; what it cannot decide is left to
the worker processes of `pool`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from oreo_jax.tasks.grading.answers import (
  FUNCTIONS,
  TEXT_COMMAND,
  drop_idle_blanks,
  normalize_answer,
)

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
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
  + rf"(?P<integer>{_INTEGER})?"
  + r"(?:(?P<point>\.)(?P<digits>\d*)"
  + r"(?:\\(?:overline|bar)\s*\{(?P<repeat>\d+)\})?)?"
  + r"(?:[eE](?P<exponent>[-+]?\d{1,2}))?"
  + r")(?P<unit>.*)",
  re.DOTALL,
)
_PERCENT = re.compile(r"\s*(?:\\?%|percent)")
_UNIT = re.compile(
  rf"\s*{TEXT_COMMAND}\s*\{{([^{{}}]*)\}}(?:\^\{{?\d\}}?)?|\s+(.*)"
)
_UNIT_WORDS = re.compile(r"\s*[A-Za-z]{2}[A-Za-z .]*")
# Words after a number that are no unit.
_NOT_UNITS = frozenset(
  "pi and or sqrt mod to times plus minus factorial dozen dozens hundred "
  "hundreds thousand thousands million millions billion billions trillion "
  "half halves thirds fourths fifths sixths sevenths eighths ninths tenths "
  "hundredths thousandths".split()
  + FUNCTIONS
)
# These are no unit right after the number, unlike in `5 feet squared`.
_POWERS = ("squared", "cubed")
# Words beside a number that no answer may exchange for one another.
_DIRECTIONS = frozenset("am pm north south east west".split())
# No formula, where `am` is a product.
_NUMBERS_AND_WORDS = re.compile(r"[-+]?[\w:.,/' {}]+")
_MARKUP = re.compile(rf"\^\\circ|{TEXT_COMMAND}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")
_SUBSCRIPTED = re.compile(r"(\w+?)_\{?\s*(\w+)\s*\}?")


class PlainNumber(NamedTuple):
  """A number that was written out, not as a formula."""

  value: Fraction
  is_decimal: bool  # has a decimal point, so it may be rounded
  is_percent: bool  # `value` is before the sign: 50% has value 50


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
  unit, groups = match["unit"], match.groupdict()
  is_percent = False
  if percent := _PERCENT.match(unit):
    is_percent, unit = True, unit[percent.end() :]
  if unit.strip() and not _is_unit(unit):
    return None
  for integer, numerator, denominator in (
    ("w0", "n1", "d1"),
    ("w2", "n2", "d2"),
    ("w3", "n3", "d3"),
    ("w3", "n4", "d4"),
  ):
    if groups[numerator] is not None:
      if int(groups[denominator]) == 0:
        return None
      value = Fraction(int(groups[numerator]), int(groups[denominator]))
      value += int(groups.get(integer) or 0)
      break
  else:
    digits = groups["digits"] or ""
    if groups["integer"] is None and not digits and not groups["repeat"]:
      return None
    integer = re.sub("[, ]", "", groups["integer"] or "0")
    value = Fraction(int(integer + digits), 10 ** len(digits))
    if repeat := groups["repeat"]:
      period = (10 ** len(repeat) - 1) * 10 ** len(digits)
      value += Fraction(int(repeat), period)
    value *= Fraction(10) ** int(groups["exponent"] or 0)
  if groups["sign"] == "-":
    value = -value
  is_decimal = groups["point"] is not None and not groups["repeat"]
  return PlainNumber(value, is_decimal, is_percent)


def compare_plainly(reference: str, answer: str) -> bool | None:
  """Compares two normalised answers; None if it takes algebra to tell.

  Decimals are compared to six places. A percentage equals both the number
  before its sign and its hundredth. Units are not compared, but for words that
  exclude each other, such as `am` and `pm`.
  """
  if drop_idle_blanks(reference) == drop_idle_blanks(answer):
    return True
  directions = _directions(reference), _directions(answer)
  if all(directions) and directions[0] != directions[1]:
    return False
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


def vote_key(answer: str) -> str:
  """Returns the same text for every spelling of a plain answer."""
  normalized = normalize_answer(answer)
  number = plain_number(normalized)
  if number is None:
    return drop_idle_blanks(normalized)
  return " ".join([str(number.value), *sorted(_directions(normalized))])


def _directions(normalized: str) -> frozenset[str]:
  """Returns the words in `_DIRECTIONS` that stand beside a number."""
  text = _MARKUP.sub("", normalized).lower()
  if not (_NUMBERS_AND_WORDS.fullmatch(text) and re.search(r"\d", text)):
    return frozenset()
  return _DIRECTIONS.intersection(re.findall("[a-z]+", text))


def _is_unit(text: str) -> bool:
  match = _UNIT.fullmatch(text)
  if not match:
    return False
  words = match[1] if match[1] is not None else match[2]
  if not _UNIT_WORDS.fullmatch(words):
    # In \text{} even a letter alone is a unit: 5 \text{ m}.
    return match[1] is not None and words.strip(" .").isalpha()
  separate = words.lower().replace(".", "").split()
  return separate[0] not in _POWERS and _NOT_UNITS.isdisjoint(separate)
