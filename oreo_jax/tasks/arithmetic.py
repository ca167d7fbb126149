"""Arithmetic: evaluate an expression over integers, one operation a line.

A problem of the default variant and a right answer to it::

  (85-(23+38))*7
  23+38=61
  85-61=24
  24*7=168

All problems of a variant have the same number of operations, so the length of
an answer says nothing about it. Operations are `+`, `-` and `*` by a one-digit
number; every intermediate result has two digits or more.

The teacher takes the leftmost operation that can be done. Where it has to carry
or borrow it forgets to with probability `forget` (`23+38=51`; subtraction takes
the smaller digit from the larger, `61-38=37`), and with probability `slip` it
miscopies a digit of an operand. Only the final number is graded, so wrong steps
can cancel; problems where forgotten carries alone could are not drawn. Measured
over 20,000 train problems with seed 0: the teacher solves 48.9% (`easy` 58.9%,
`hard` 38.8%); of the answers it is rewarded for, 0.17% have a wrong step
(0.04%, 0.30%); the commonest of 988 (984, 3667) right answers makes up 0.3%.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from oreo_jax.tasks.drawing import draw_distinct
from oreo_jax.tasks.expression_shapes import expression_shapes
from oreo_jax.tasks.task import SPLITS, Problem, check_pairs, check_split
from oreo_jax.tasks.vocabulary import make_character_tokenizer

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

OPERATORS = "+-*"

# Options that differ from the defaults of `ArithmeticTask`.
VARIANTS = {
  "default": {},
  "easy": {"operations": 3},
  "hard": {"operations": 5, "max_value": 9999},
}

# Expressions drawn at a time. Another number would give other problems for the
# same seed.
_CHUNK = 4096
_STEP = re.compile(r"(-?\d+)([-+*])(-?\d+)=(-?\d+)")
_FINAL = re.compile(r"=(-?\d+)\n?\Z")
_INNER = re.compile(r"\((-?\d+)([-+*])(-?\d+)\)|\A(-?\d+)([-+*])(-?\d+)\Z")


class _Expressions(NamedTuple):
  """N expressions of K operations, in the order the teacher takes them.

  Values are numbered: K+1 leaves from left to right, then K results.
  """

  leaves: np.ndarray  # int[N, K+1]
  operators: np.ndarray  # int[N, K], an index into `OPERATORS`
  operands: np.ndarray  # int[N, K, 2], numbers of values


@dataclasses.dataclass(frozen=True)
class ArithmeticTask:
  """Expressions, verifier and teacher; see the module docstring.

  Attributes:
    operations: operations an expression, and steps an answer (1 to 6).
    max_value: no intermediate result is larger.
    forget: probability that the teacher forgets to carry where it has to.
    slip: probability a step that the teacher miscopies an operand.
    seed: expressions and teacher are functions of it. An expression belongs
      to the same split whatever the seed.
    train_size: problems of the train split when no count is given.
    validation_size: the same for validation.
    test_size: the same for test.
    demonstration_count: teacher's answers when no count is given.
  """

  operations: int = 4
  max_value: int = 999
  forget: float = 0.25
  slip: float = 0.02
  seed: int = 0
  train_size: int = 50_000
  validation_size: int = 1_000
  test_size: int = 2_000
  demonstration_count: int = 20_000
  name: str = dataclasses.field(default="arithmetic", init=False)

  def __post_init__(self) -> None:
    if not 1 <= self.operations <= 6:
      raise ValueError(
        f"arithmetic operations must be 1 to 6; got {self.operations}"
      )
    if not 200 <= self.max_value <= 10**8:
      raise ValueError(
        f"arithmetic max_value must be 200 to 1e8; got {self.max_value}"
      )
    for name in ("forget", "slip"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise ValueError(
          f"arithmetic {name} is a probability; got {getattr(self, name)}"
        )

  def problems(self, split: str, count: int | None = None) -> list[Problem]:
    """Returns the first `count` expressions of a split (see `Task`)."""
    check_split(split)
    if count is None:
      count = getattr(self, f"{split}_size")
    return self._as_problems(split, self._draw(split, count))

  def demonstrations(
    self, count: int | None = None
  ) -> list[tuple[Problem, str]]:
    """Returns the teacher's answers to the first `count` train problems."""
    if count is None:
      count = self.demonstration_count
    expressions = self._draw("train", count)
    problems = self._as_problems("train", expressions)
    return list(zip(problems, self._teach(expressions), strict=True))

  def grade(
    self, problems: Sequence[Problem], responses: Sequence[str]
  ) -> np.ndarray:
    """Returns f32[n]: 1 where the last line ends in the answer, else 0."""
    check_pairs(problems, responses)
    return np.array(
      [
        self.final_answer(response) == problem.answer
        for problem, response in zip(problems, responses, strict=True)
      ],
      np.float32,
    )

  def grading_report(self) -> dict[str, int]:
    """Returns nothing: the verifier is exact and never fails."""
    return {}

  def final_answer(self, response: str) -> str:
    """Returns the number the last line ends in, as text; empty if none."""
    match = _FINAL.search(response)
    return match[1] if match else ""

  def first_wrong_step(self, problem: Problem, response: str) -> int | None:
    """Returns the index of the first wrong or missing step, None if all right.

    A step is right if it does an operation of the expression that can be done
    now, in any order, and does it correctly.
    """
    expression = problem.prompt.rstrip("\n")
    *lines, rest = response.split("\n")
    for index, line in enumerate(lines):
      step = _STEP.fullmatch(line)
      if not step:
        return index
      if str(_apply(step[2], int(step[1]), int(step[3]))) != step[4]:
        return index
      for place in _INNER.finditer(expression):
        if place.group().strip("()") == line[: line.index("=")]:
          before, after = expression[: place.start()], expression[place.end() :]
          expression = before + step[4] + after
          break
      else:
        return index
    return None if expression == problem.answer and not rest else len(lines)

  def make_tokenizer(self) -> PreTrainedTokenizerFast:
    """Returns one token a digit, sign, parenthesis and line break."""
    return make_character_tokenizer("0123456789" + OPERATORS + "=()")

  def _draw(self, split: str, count: int) -> _Expressions:
    return _Expressions(
      *draw_distinct(self._draw_chunk, split, count, seed=self.seed)
    )

  def _draw_chunk(
    self, random: np.random.Generator
  ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Draws expressions that fit, whichever carries the teacher forgets."""
    k, rows = self.operations, np.arange(_CHUNK)
    shape = random.integers(len(self._shapes), size=_CHUNK)
    operands = self._shapes[shape]
    operators = random.integers(len(OPERATORS), size=(_CHUNK, k))
    leaves = random.integers(10, 100, (_CHUNK, k + 1))
    small = random.integers(2, 10, (_CHUNK, k))
    # A product takes a one-digit number on its right. Only a leaf (a value
    # numbered up to K) can be one, so that other products become sums.
    product = operators == OPERATORS.index("*")
    factor = operands[:, :, 1]
    operators[product & (factor > k)] = OPERATORS.index("+")
    for step in range(k):
      chosen = product[:, step] & (factor[:, step] <= k)
      leaves[rows[chosen], factor[chosen, step]] = small[chosen, step]
    drawn = _Expressions(leaves, operators, operands)
    # The teacher may forget to carry at any subset of the steps. Work the
    # expressions out for each: row 0 is the empty subset, the right results.
    subsets = (np.arange(2**k)[:, None] >> np.arange(k)) & 1 == 1
    results = np.stack(
      [self._run(drawn, np.tile(subset, (_CHUNK, 1))) for subset in subsets],
      axis=1,
    )  # [N, subset, step]
    fits = (results[:, 0] >= 10) & (results[:, 0] <= self.max_value)
    wanted = fits.all(axis=1) & (results >= 0).all(axis=(1, 2))
    # Forgotten carries that cancel would reward an answer with wrong steps.
    wrong = (results != results[:, :1]).any(axis=2)
    lucky = wrong & (results[:, :, -1] == results[:, :1, -1])
    wanted &= ~lucky.any(axis=1)
    codes = np.concatenate([shape[:, None], operators, leaves], axis=1)
    return codes[wanted], tuple(array[wanted] for array in drawn)

  def _run(self, drawn: _Expressions, forgets: np.ndarray) -> np.ndarray:
    """Returns int[N, K]: the results where carries are forgotten or not."""
    values, rows = drawn.leaves, np.arange(len(drawn.leaves))
    for step in range(self.operations):
      first = values[rows, drawn.operands[:, step, 0]]
      second = values[rows, drawn.operands[:, step, 1]]
      result = _operate(
        drawn.operators[:, step], first, second, forgets[:, step]
      )
      values = np.concatenate([values, result[:, None]], axis=1)
    return values[:, self.operations + 1 :]

  def _teach(self, drawn: _Expressions) -> list[str]:
    """Works through all expressions at once, with the teacher's mistakes."""
    k, count = self.operations, len(drawn.leaves)
    random = np.random.default_rng([self.seed, len(SPLITS)])
    values, rows = drawn.leaves, np.arange(count)
    answers = [""] * count
    for step in range(k):
      pair = values[rows[:, None], drawn.operands[:, step]]  # [N, 2]
      side = random.integers(0, 2, count)
      tens = (random.random(count) < 0.5) & (pair[rows, side] >= 10)
      place = np.where(tens, 10, 1)
      miscopied = np.flatnonzero(random.random(count) < self.slip)
      digit = pair[rows, side] // place % 10
      change = (digit + random.integers(1, 10, count)) % 10 - digit
      pair[miscopied, side[miscopied]] += (place * change)[miscopied]
      forgets = random.random(count) < self.forget
      operator = drawn.operators[:, step]
      result = _operate(operator, pair[:, 0], pair[:, 1], forgets)
      values = np.concatenate([values, result[:, None]], axis=1)
      for i, (o, (a, b), c) in enumerate(
        zip(operator.tolist(), pair.tolist(), result.tolist(), strict=True)
      ):
        answers[i] += f"{a}{OPERATORS[o]}{b}={c}\n"
    return answers

  @functools.cached_property
  def _shapes(self) -> np.ndarray:
    """int[S, K, 2]: the operands of every shape of expression."""
    return expression_shapes(self.operations)

  def _as_problems(self, split: str, drawn: _Expressions) -> list[Problem]:
    exact = self._run(drawn, np.zeros(drawn.operators.shape, bool))
    problems = []
    for index, (leaves, operators, operands, answer) in enumerate(
      zip(
        *(array.tolist() for array in drawn), exact[:, -1].tolist(), strict=True
      )
    ):
      texts = [str(leaf) for leaf in leaves]
      for operator, (first, second) in zip(operators, operands, strict=True):
        texts.append(f"({texts[first]}{OPERATORS[operator]}{texts[second]})")
      prompt = texts[-1][1:-1] + "\n"
      problems.append(Problem(f"{split}-{index}", prompt, str(answer)))
    return problems


def make_arithmetic(variant: str = "default", **options: Any) -> ArithmeticTask:
  """Makes the task: a variant's options, then the caller's over them."""
  if variant not in VARIANTS:
    raise ValueError(
      f"arithmetic variant must be one of {', '.join(VARIANTS)}; "
      f"got {variant!r}"
    )
  return ArithmeticTask(**(VARIANTS[variant] | options))


def _apply(operator: str, first: int, second: int) -> int:
  if operator == "+":
    return first + second
  return first - second if operator == "-" else first * second


def _operate(
  operator: np.ndarray,
  first: np.ndarray,
  second: np.ndarray,
  forgets: np.ndarray,
) -> np.ndarray:
  """Returns int[N]: first (operator) second, by column where it forgets.

  Without carries every column stands alone: the last digit of the sum or the
  product, the difference of the smaller digit from the larger. The leading
  column of a sum or product is written in full. Negative numbers, which only
  a miscopied operand can give, are computed exactly.
  """
  exact = np.select(
    [operator == 0, operator == 1],
    [first + second, first - second],
    first * second,
  )
  larger, columns, place = np.maximum(first, second), np.zeros_like(exact), 1
  while place <= larger.max(initial=0):
    one, other = first // place % 10, second // place % 10
    column = np.select(
      [operator == 0, operator == 1],
      [one + other, np.abs(one - other)],
      one * second,
    )
    leading = larger < 10 * place
    columns += place * np.where(leading, column, column % 10)
    place *= 10
  usable = forgets & (first >= 0) & (second >= 0)
  return np.where(usable, columns, exact)
