"""What a setting is: a field of a dataclass with its limits beside it.

    @dataclasses.dataclass(unsafe_hash=True)
    class Sampling(Section):
      top_k: int = 0  # 0: off
      top_p: float = setting(1.0, above=0, high=1)  # 1: off

`Section.validate` walks the fields of a section and of all below it, so that no
setting can be added without a check: a number is finite and, unless its limits
say otherwise, not negative. What depends on two settings at once is a rule.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

_LARGEST_INT = 2**31 - 1  # whole numbers end up in int32 arrays
_KINDS = {int: "a whole number", float: "a finite number", bool: "a bool"}


class ConfigError(ValueError):
  """A setting that cannot work; the message names the flag that mends it."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a setting may be; of a tuple, what each of its entries may be."""

  low: float | None = 0  # the least legal number
  above: float | None = None  # a number that must be exceeded
  high: float | None = None  # the greatest legal number
  below: float | None = None  # a number that must not be reached
  choices: tuple[str, ...] = ()  # the legal words; empty: any
  entry: type | None = None  # the type of a tuple's entries; None: any
  nonempty: bool = False  # whether a tuple needs an entry

  def allow(self, value: Any, kind: type) -> bool:
    """Returns whether a value has the type `kind` and keeps to the limits."""
    if kind not in (int, float):
      is_word = not self.choices or value in self.choices
      return isinstance(value, kind) and is_word
    # A bool is an int to Python, and a whole number is as good as a float.
    types = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, types):
      return False
    if kind is int and abs(value) > _LARGEST_INT:
      return False
    return math.isfinite(value) and not (
      (self.low is not None and value < self.low)
      or (self.above is not None and value <= self.above)
      or (self.high is not None and value > self.high)
      or (self.below is not None and value >= self.below)
    )

  def describe(self, kind: type) -> str:
    """Returns in words what `allow` lets pass."""
    if self.choices:
      return "one of " + ", ".join(self.choices)
    text = _KINDS.get(kind, kind.__name__)
    if kind not in (int, float):
      return text
    bounds = [
      f"{word} {bound:g}"
      for word, bound in (
        ("at least", self.low if self.above is None else None),
        ("above", self.above),
        ("at most", self.high),
        ("below", self.below),
      )
      if bound is not None
    ]
    return f"{text} {' and '.join(bounds)}".rstrip()


def setting(
  default: Any,
  *,
  low: float | None = 0,
  above: float | None = None,
  high: float | None = None,
  below: float | None = None,
  choices: tuple[str, ...] = (),
  entry: type | None = None,
  nonempty: bool = False,
) -> Any:
  """Declares a setting of a `Section` with its limits.

  Args:
    default: the value when nobody sets it.
    low: the least legal number; None lets all negative ones pass.
    above: a number that must be exceeded.
    high: the greatest legal number.
    below: a number that must not be reached.
    choices: the legal words; empty lets any pass.
    entry: the type of a tuple's entries, which the limits are then of.
    nonempty: whether a tuple needs at least one entry.

  Returns:
    A dataclass field, typed Any so that the annotation beside it counts.
  """
  limits = Limits(low, above, high, below, choices, entry, nonempty)
  return dataclasses.field(default=default, metadata={"limits": limits})


def positive(default: float) -> Any:
  """Declares a number above zero."""
  return setting(default, above=0)


def choice(*words: str) -> Any:
  """Declares a word out of several, of which the first is the default."""
  return setting(words[0], choices=words)


def section(kind: type[Section]) -> Any:
  """Declares a section below a section, with the defaults of its class."""
  return dataclasses.field(default_factory=kind)


class Rule(NamedTuple):
  """What one setting must be because of another."""

  holds: bool
  name: str  # the setting to change: its path within the section
  expected: str  # what it should be, in words


class Section:
  """A dataclass of settings, and of further sections, that checks itself."""

  def rules(self) -> Iterator[Rule]:
    """Yields what the limits of single settings cannot say.

    It is asked only when every single setting keeps to its limits.
    """
    yield from ()

  def validate(self, path: str = "") -> None:
    """Checks the settings of this section and of those below it.

    Args:
      path: dotted path of the section in the config, for the messages.

    Raises:
      ConfigError: on the first setting that cannot work; the message names
        its flag.
    """
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      value = getattr(self, field.name)
      name = _join(path, field.name)
      if isinstance(value, Section):
        value.validate(name)
      else:
        limits = field.metadata.get("limits", Limits())
        _check(name, value, field.type, limits)
    for rule in self.rules():
      if not rule.holds:
        value = operator.attrgetter(rule.name)(self)
        raise _refusal(_join(path, rule.name), rule.expected, value)


def _check(name: str, value: Any, kind: Any, limits: Limits) -> None:
  """Raises ConfigError unless a value has its type and keeps to its limits."""
  if kind is not tuple:
    if not limits.allow(value, kind):
      raise _refusal(name, limits.describe(kind), value)
    return
  if not isinstance(value, tuple):
    raise _refusal(name, "tuple", value)
  if limits.nonempty and not value:
    raise _refusal(name, "at least one entry", value)
  kind = limits.entry
  if kind and not all(limits.allow(entry, kind) for entry in value):
    expected = f"a tuple, each entry {limits.describe(kind)}"
    raise _refusal(name, expected, value)


def _refusal(name: str, expected: str, value: Any) -> ConfigError:
  return ConfigError(
    f"config.{name}: expected {expected}, got {value!r}: set "
    f"--config.{name}=..."
  )


def _join(path: str, name: str) -> str:
  return f"{path}.{name}" if path else name


def parse_tuple(text: str) -> tuple:
  """Returns the tuple that a flag's text means.

  Commas part the entries. Brackets round them and quotes round words may be
  left out, since a shell asks for more of them:

    >>> parse_tuple("1,3"), parse_tuple("(1, 3)"), parse_tuple("3")
    ((1, 3), (1, 3), (3,))
    >>> parse_tuple("rejection,dpo"), parse_tuple("")
    (('rejection', 'dpo'), ())
  """
  try:
    value = ast.literal_eval(text)
  except (SyntaxError, ValueError):
    words = text.strip().removeprefix("(").removesuffix(")").split(",")
    return tuple(word.strip() for word in words if word.strip())
  return tuple(value) if isinstance(value, list | tuple) else (value,)


def build(kind: type, values: dict[str, Any], path: str = "") -> Any:
  """Builds a section from a nested dict of plain values.

  Args:
    kind: the section's class.
    values: field names to plain values or nested dicts; missing fields keep
      their defaults.
    path: dotted path of the section, for messages.

  Returns:
    An instance of `kind`.

  Raises:
    ConfigError: on an unknown key (naming the nearest valid one) or on a
      value of the wrong type.
  """
  if not isinstance(values, dict):
    raise ConfigError(f"config.{path}: expected a section, got {values!r}")
  types: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(kind)}
  built = {}
  for key, value in values.items():
    name = _join(path, key)
    if key not in types:
      raise ConfigError(unknown_key(name, field_paths(kind(), path)))
    wanted = types[key]
    if issubclass(wanted, Section):
      value = build(wanted, value, name)
    elif wanted is float and type(value) is int:
      value = float(value)
    elif wanted is tuple and isinstance(value, list):
      value = tuple(value)
    is_flag = wanted is int and isinstance(value, bool)
    if is_flag or not isinstance(value, wanted):
      raise _refusal(name, wanted.__name__, value)
    built[key] = value
  return kind(**built)


def field_paths(section: Any, path: str = "") -> list[str]:
  """Returns the dotted paths of all settings below `section`."""
  paths = []
  for field in dataclasses.fields(section):
    name = _join(path, field.name)
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      paths += field_paths(value, name)
    else:
      paths.append(name)
      if isinstance(value, dict):
        paths += [f"{name}.{key}" for key in value]
  return paths


def unknown_key(name: str, valid: list[str]) -> str:
  """Returns the message for a key that is not in `valid`, with the nearest."""
  section, _, last = name.rpartition(".")
  # learning_rate means lr: abbreviations are too far for a spelling match.
  short = "".join(word[:1] for word in last.split("_"))
  abbreviated = [f"{section}.{short}"] if f"{section}.{short}" in valid else []
  near = abbreviated or difflib.get_close_matches(name, valid, n=1, cutoff=0.3)
  hint = f"; did you mean config.{near[0]}?" if near else ""
  return f"config.{name} is not a setting{hint}"
